"""The benchmark of decoding, shrunken: it measures what it says, keeps to its minutes, and finds where curves cross."""

import importlib.util
import json
import sys
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parents[2]


def module():
    spec = importlib.util.spec_from_file_location("decode_benchmark", ROOT / "benchmarks" / "decode.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def measured(rank, world, output, *options):
    words = ["--size", "tiny", "--batch", "2", "--positions", "64,640", "--steps", "2", "--dtype", "float32"]
    with patch.object(sys, "argv", ["decode.py", "--output", output, *words, *options]):
        module().main()
    return json.loads(Path(output).read_text())


def test_shrunken(gloo, tmp_path):
    models = "softmax,gated_deltanet:LLLN,gla:L"
    report = gloo(1, measured, str(tmp_path / "decode.json"), "--models", models)[0]
    rows = {(row["model"], row["position"]): row for row in report["results"]}
    assert len(rows) == 6 and all(row["ms_per_token"] > 0 for row in rows.values())
    assert report["device"] == "CPU" and report["crossings"].keys() == set(models.split(",")[1:])
    heads, width, batch, layers = 4, 32, 2, 4
    for (model, position), row in rows.items():
        assert row["capacity"] >= position or model == "gla:L"
        softmax = {"softmax": layers, "gated_deltanet:LLLN": 1, "gla:L": 0}[model]
        assert row["kv_cache_bytes"] == 4 * 2 * softmax * batch * row["capacity"] * heads * width
    for model in models.split(","):
        assert rows[model, 64]["recurrent_bytes"] == rows[model, 640]["recurrent_bytes"]
    assert (tmp_path / "decode.png").stat().st_size > 1000


def test_no_minutes(gloo, tmp_path):
    options = ["--models", "gla:L", "--minutes", "0"]
    report = gloo(1, measured, str(tmp_path / "decode.json"), *options)[0]
    assert [row["skipped"] for row in report["results"]] == ["the minutes are used up"] * 2


def crossing(rank, world):
    find = module().crossings
    rows = [("softmax", 1, 1.0), ("softmax", 2, 2.0), ("softmax", 4, 4.0), ("softmax", 8, None)]
    rows += [("a", 1, 1.5), ("a", 2, 1.5), ("a", 4, 1.5), ("a", 8, 1.5), ("b", 1, 9.0), ("b", 2, 9.0)]
    return find([{"model": m, "position": p} | ({"ms_per_token": t} if t else {}) for m, p, t in rows])


def test_where_curves_cross(gloo):
    assert gloo(1, crossing)[0] == {"a": 2, "b": None}

"""``python -m linear_moe.bench decode``: two tiny models on a CPU, and where the report says that they cross."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from linear_moe.bench import decode_report

TINY = ["--size", "tiny", "--dtype", "float32", "--batch", "2", "--positions", "8,64", "--steps", "8"]


def decode(rank: int, world: int, argv: list[str]) -> int:
    from linear_moe.bench.decode import main

    return main(argv)


def test_two_models(gloo: Callable, tmp_path: Path) -> None:
    argv = [*TINY, "--models", "softmax,gla:LLLN,gla", "--output", str(tmp_path)]
    assert gloo(1, decode, argv) == [0]
    rows = json.loads((tmp_path / "decode.json").read_text())["results"]
    by = {(row["model"], row["position"]): row for row in rows}
    assert len(by) == 6 and all(row["status"] == "ok" and row["ms_per_token"] > 0 for row in rows)
    assert by["softmax", 8]["recurrent_bytes"] == 0 == by["gla", 8]["kv_cache_bytes"]
    assert by["softmax", 8]["kv_cache_bytes"] < by["softmax", 64]["kv_cache_bytes"]
    assert by["gla", 8]["recurrent_bytes"] == by["gla", 64]["recurrent_bytes"] > 0
    assert "| 64 | " in (tmp_path / "decode.md").read_text() and (tmp_path / "decode.png").exists()
    assert gloo(1, decode, [*argv, "--minutes", "0", "--positions", "128"]) == [0], (
        "and the earlier rows stay"
    )
    rows = json.loads((tmp_path / "decode.json").read_text())["results"]
    assert len(rows) == 9 and rows[-1]["error"] == "the time was over"


@pytest.mark.parametrize("options", [["--models", "gal:L"], ["--size", "A9"], ["--models", "gla:LLLNN"]])
def test_a_mistake_is_three_lines(gloo: Callable, options: list[str], tmp_path: Path) -> None:
    assert gloo(1, decode, [*TINY, "--output", str(tmp_path / "out"), *options]) == [2]
    assert not (tmp_path / "out").exists()


def test_where_they_cross() -> None:
    times = {
        "softmax": {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0},
        "fast at last": {1: 0.5, 2: 3.0, 4: 3.0, 8: 3.0},
        "never": {1: 1.0, 8: 9.0},
    }
    about = dict(family="qwen2", size="tiny", batch=2, dtype="float32", no_graph=False)
    rows = [
        dict(model=name, position=place, ms_per_token=ms, **about)
        for name, known in times.items()
        for place, ms in known.items()
    ]
    found = decode_report.crossings(rows)
    assert found == {
        "fast at last, qwen2 tiny, batch 2 float32": 4,
        "never, qwen2 tiny, batch 2 float32": None,
    }

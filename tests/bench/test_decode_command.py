"""``python -m linear_moe.bench decode``: two tiny models on a CPU, and where the report says that they cross."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from linear_moe.bench import decode_report, step
from linear_moe.bench.configurations import Sweep, models_of

TINY = ["--size", "tiny", "--dtype", "float32", "--batch", "2", "--positions", "8", "64", "--steps", "8"]


def decode(rank: int, world: int, argv: list[str]) -> int:
    from linear_moe.bench.decode import main

    return main(argv)


def decode_told(rank: int, world: int, argv: list[str]) -> tuple[int, str]:
    from linear_moe.bench.decode import main

    with contextlib.redirect_stderr(io.StringIO()) as told:
        return main(argv), told.getvalue()


def test_two_models(gloo: Callable, tmp_path: Path) -> None:
    argv = [*TINY, "--models", "softmax", "gla:LLLN", "gla", "--output", str(tmp_path)]
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


MISTAKES = {
    "--models gal:L": "unknown mixer 'gal'; ",
    "--size A9": "unknown MODEL_SIZE=A9 ",
    "--models gla:LLLNN": "LAYER_TYPE_LIST=LLLNN ",
    "--positions 8 x": "--positions x is no position.",
    "--positions 0,8": "--positions 0 is no position.",
    "--positions ,": "--positions without a number is no position.",
    "--steps 0": "--steps 0 is less than 1.",
    "--batch -1": "--batch -1 is less than 1.",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_is_three_lines(gloo: Callable, options: str, tmp_path: Path) -> None:
    argv = [*TINY, "--output", str(tmp_path / "out"), *options.split()]
    code, told = gloo(1, decode_told, argv)[0]
    what, why, instead = told.splitlines()
    assert code == 2 and what.startswith(f"linear_moe.bench: {MISTAKES[options]}"), told
    assert why.startswith("  why: ") and instead.startswith("  try: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "models"),
    [
        ("softmax mamba2:LLLN gla", ["softmax", "mamba2:LLLN", "gla"]),
        ("softmax,mamba2:LLLN,gla", ["softmax", "mamba2:LLLN", "gla"]),
        ("softmax,rwkv6", ["softmax", "rwkv6"]),
        ("softmax, gla", ["softmax", "gla"]),
        ("gla,mamba2:12N gla,kda", ["gla,mamba2:12N", "gla", "kda"]),
    ],
)
def test_commands_read_one_form_of_models(words: str, models: list[str]) -> None:
    """And the earlier one of ``decode``, with commas; several mixers of one model have digits in their pattern."""
    assert models_of(words.split()) == models
    given = step.parser().parse_args(["--models", *words.split()])
    assert Sweep.of(given).models == models


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

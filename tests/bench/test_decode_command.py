"""``python -m linear_moe.bench decode``: two tiny models on a CPU, and where the report says that they cross."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from linear_moe.bench import decode as decode_command
from linear_moe.bench import decode_report, step
from linear_moe.bench.configurations import Sweep, models_of
from linear_moe.launch.errors import PreflightError

TINY = ["--size", "tiny", "--dtype", "float32", "--batch", "2", "--positions", "8", "64", "--steps", "8"]


def decode(rank: int, world: int, argv: list[str]) -> int:
    return decode_command.main(argv)


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
    "--batch 1 --steps 1 --positions 1 --size A9": "unknown MODEL_SIZE=A9 ",
}


@pytest.mark.parametrize("options", MISTAKES)
def test_a_mistake_is_three_lines(options: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = [*TINY, "--output", str(tmp_path / "out"), *options.split()]
    code = decode_command.main(argv)
    told = capsys.readouterr().err
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


def refused(*argv: str) -> str | None:
    """What is told of the farthest position of each model in turn; None: nothing."""
    args = decode_command.parser().parse_args(argv)
    try:
        for name in models_of(args.models):
            plan, positions = (
                decode_command.plan_of(name, args),
                decode_command.positions_of(args.positions),
            )
            decode_command.refuse_on_cpu(name, plan, args, positions[-1])
    except PreflightError as error:
        return str(error)
    return None


def test_what_a_cpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The defaults are of a GPU: 105 GB of keys on a CPU, and seconds per token. What is told instead passes."""
    monkeypatch.setattr(decode_command, "cuda_device_count", lambda: 0)
    what, why, instead = str(refused()).splitlines()
    assert what.startswith("softmax of qwen2 A0.3B at batch 16 and position 131072") and "108 GB" in why
    words = instead.partition("linear_moe.bench decode ")[2].split()
    assert words and refused(*words) is None
    assert "5 GB" in str(refused("--models", "gla:L")), "weights alone"
    tiny = ["--models", "softmax", "--size", "tiny", "--dtype", "float32", "--batch"]
    assert refused(*tiny, "2") is None and "position 131072" in str(refused(*tiny, "10")), "keys alone"
    assert refused("--family", "deepseek_v2", *tiny, "10") is None, "which latent attention has fewer of"
    monkeypatch.setattr(decode_command, "cuda_device_count", lambda: 1)
    assert refused() is None


def test_it_is_told_before_torch_is_there(tmp_path: Path) -> None:
    code = "import sys; from linear_moe.bench.__main__ import main; code = main(sys.argv[1:]); "
    code += "sys.exit(3 if {'torch', 'megatron'} & {*sys.modules} else code)"
    argv = [sys.executable, "-c", code, "decode", "--size", "A9", "--output", str(tmp_path / "out")]
    done = subprocess.run(argv, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 3, done.stderr
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

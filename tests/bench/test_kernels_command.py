"""``python -m linear_moe.bench kernels`` in its smoke sizes, interpreted on a CPU; its report, from made-up rows."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from linear_moe.bench import __main__ as command_line
from linear_moe.bench.kernels import command, report
from linear_moe.bench.kernels.calls import ALL_SHAPES, FAMILIES, OURS, PEER, SHAPES, inputs, least_bytes
from linear_moe.bench.kernels.first_calls import _different
from linear_moe.bench.kernels.peer import arguments, let_it_run, peer, place
from linear_moe.bench.record import Record

ROOT = Path(__file__).parents[2]
WITHOUT = "import runpy, sys; sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(','))); "
"""Packages that are not installed."""
QUICK = "import os; os.environ['TRITON_INTERPRET'] = '1'; from tests.kernels import quick_interpreter; "
QUICK += "quick_interpreter.install(); "


def run(
    out: Path, *options: str, without: str = "megatron"
) -> tuple[subprocess.CompletedProcess, list[dict]]:
    code = WITHOUT + QUICK + "runpy.run_module('linear_moe.bench', run_name='__main__', alter_sys=True)"
    argv = [sys.executable, "-c", code, without, "kernels", "--smoke", "--output", str(out), *options]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (out / "kernels.json").exists(), done.stdout + done.stderr
    return done, json.loads((out / "kernels.json").read_text())["results"]


def test_every_part_runs_without_megatron(tmp_path: Path) -> None:
    options = "--families", "linear", "rwkv7", "--sweep", "--shapes", "tiny_packed"
    done, rows = run(tmp_path, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    ours = {row["part"]: row for row in rows if row["family"] == "linear" and row["who"] == "ours"}
    assert ours["right"]["outputs"] < 1e-6 and ours["right"]["gradients"] < 1e-6
    assert ours["time"]["backend"] == "triton" and ours["time"]["both_ms"] > ours["time"]["floor_ms"] > 0
    assert ours["sweep"]["best"][0]["ms"] > 0
    assert not [row for row in rows if row["who"] == "fla"] and len(rows) == 6
    assert done.stdout.count("flash-linear-attention is left out: it ") == 1
    assert "| linear |" in (tmp_path / "kernels.md").read_text()
    assert (tmp_path / "kernels.png").stat().st_size > 1000


def test_the_rest_is_said_when_time_is_over(tmp_path: Path) -> None:
    """And rows of an earlier command stay."""
    old = dict(part="right", family="linear", shape="tiny", dtype="float32", who="ours", status="ok")
    Record(tmp_path / "kernels.json", "earlier").put({**old, **ROW, "over_limit": []}, ("part",))
    options = "--families", "linear", "--minutes", "0", "--parts", "right"
    done, rows = run(tmp_path, *options, without="megatron,matplotlib")
    assert done.returncode == 0 and [row["status"] for row in rows] == ["ok", "not begun"]
    assert (
        "right, linear at tiny_packed, float32, linear_moe: not begun"
        in (tmp_path / "kernels.md").read_text()
    )


def test_a_gpu_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert command_line.main(["kernels", "--output", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[1].startswith("  why: ") and lines[2].startswith("  try: "), lines
    assert not (tmp_path / "out").exists()


ROW: dict[str, Any] = dict(
    device="H100",
    versions={"torch": "2", "triton": "3.6"},
    outputs=1e-3,
    gradients=2e-3,
    over_limit=["grad q"],
)


def made_up(path: Path) -> Record:
    record = Record(path / "kernels.json", "the command")

    def put(part: str, family: str, who: str, shape: str = "2k", status: str = "ok", **figures: Any) -> None:
        row = dict(part=part, family=family, shape=shape, dtype="bfloat16", who=who, status=status)
        record.put({**row, **ROW, **figures}, ("part", "family", "shape", "who"))

    ours = dict(how="graph", floor_ms=0.25, bandwidth=3.02e12)
    put("time", "mamba2", "ours", forward_ms=0.1, both_ms=0.5, **ours)
    put("time", "mamba2", "fla", forward_ms=0.3, both_ms=2.0, how="graph", note="result wrong")
    put("time", "gla", "ours", forward_ms=0.2, both_ms=1.0, **ours)
    put("time", "gla", "fla", forward_ms=0.1, both_ms=16.0, how="launches")
    put("time", "softmax", "torch", forward_ms=0.26, both_ms=1.2, how="graph")
    put("memory", "gla", "ours", peak_mib=100.0)
    put("memory", "gla", "fla", peak_mib=400.0)
    put("right", "gla", "ours", status="wrong")
    put("cold", "gla", "ours", seconds=4.0)
    put("time", "kda", "fla", status="failed", error="OutOfMemoryError: too much")
    return record


def test_tables_and_plot(tmp_path: Path) -> None:
    record = made_up(tmp_path)
    assert [path.name for path in report.write(record)] == ["kernels.md", "kernels.png"]
    text = (tmp_path / "kernels.md").read_text()
    for shown in (
        "* H100; ",
        "at 3.02 TB/s",
        "* forward: 1.22 times as fast in the geometric mean of 2 pairs; worse: gla at 2k",
        "* forward + backward: 8.00 times as fast in the geometric mean of 2 pairs; worse: none",
        "* memory: 0.25 of the memory in the geometric mean of 1 pairs; worse: none",
        "| mamba2 | 0.100 | 0.500 | 0.250 | 2.00 | 0.300\\* | 2.000\\* | 4.00 | - | - |",
        "| gla | 0.200 | 1.000 | 0.250 | 4.00 | 0.100 L | 16.000 L | 16.00 | 100 | 400 |",
        "| softmax | 0.260 | 1.200 | - | - | - | - | - | - | - |",
        "\\* result wrong",
        "| gla | 1.0e-03, 2.0e-03 OVER: grad q |",
        "| gla | 4.0 |",
        "* time, kda at 2k, bfloat16, flash-linear-attention: failed: OutOfMemoryError: too much",
    ):
        assert shown in text, text
    assert (tmp_path / "kernels.png").stat().st_size > 1000


def test_without_matplotlib_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.write(made_up(tmp_path)) == [tmp_path / "kernels.md"]
    assert capsys.readouterr().out.endswith("kernels.png is not drawn: matplotlib is not installed\n")


def test_floors() -> None:
    """Of the issue: four tensors of 67 MB forward, eleven with backward, and one of float32 decays thrice."""
    unit = 2**15 * 8 * 128 * 2
    assert least_bytes(FAMILIES["linear"], SHAPES["2k"]) == (4 * unit, 11 * unit)
    assert least_bytes(FAMILIES["gla"], SHAPES["2k"]) == (6 * unit, 17 * unit)


def test_one_process_compiles_what_shapes_share() -> None:
    names, shapes = ["linear", "gla"], ["2k", "16k", "64", "packed"]
    assert _different(PEER, names, shapes) == [(n, s) for s in ("2k", "64", "packed") for n in names]
    assert _different(OURS, names, shapes) == [(n, s) for s in shapes for n in names]


class Guarded:
    IS_NVIDIA_HOPPER = TRITON_ABOVE_3_4_0 = True
    TRITON_ABOVE_3_7_1 = False


def test_a_guard_that_is_passed_marks_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time, on the compiler that it is about, for the one pass that it is about."""
    monkeypatch.setattr("importlib.import_module", lambda name: guarded)
    guarded: Any = Guarded()
    assert let_it_run(FAMILIES["gla"]) is None and not guarded.TRITON_ABOVE_3_7_1
    for _ in range(2):
        assert let_it_run(FAMILIES["gated_delta_net"]) == "result wrong on this compiler"
        assert guarded.TRITON_ABOVE_3_7_1
    guarded = Guarded()
    guarded.TRITON_ABOVE_3_7_1 = True
    assert let_it_run(FAMILIES["mamba2"]) is None


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.peer])
def test_the_peer_takes_these_arguments(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, operator = place(FAMILIES[name])
    module = pytest.importorskip(folder)
    signature, given = inspect.signature(getattr(module, operator)), {}
    monkeypatch.setattr(module, operator, lambda **named: given.update(named))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    shape = ALL_SHAPES["tiny_packed"]
    named = arguments(inputs(FAMILIES[name], shape, torch.float32, "cpu"))
    peer(FAMILIES[name], shape)(**named)
    signature.bind(**given)  # TypeError for one that is unknown or missing
    assert len(given) == len(named) + 1 and given["cu_seqlens"].dtype == torch.int64
    assert given["scale"] == shape.keys**-0.5


def test_options_in_the_documentation_exist() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text()
    for line in text.splitlines():
        if line.strip().startswith("python -m linear_moe.bench kernels"):
            command.parser().parse_args(line.split()[4:])
    assert "python -m linear_moe.bench kernels" in text and set(ALL_SHAPES) > set(SHAPES)

"""Figures of a timed run from what it left, and of where its time went, by hand."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType

from linear_moe.bench import breakdown, report, running, step
from linear_moe.bench.configurations import Sweep, sweep

ASKED: Any = SimpleNamespace(warm_up=2, steps=3)


def steps(*seconds: float) -> list[dict[str, Any]]:
    """Other figures follow from the seconds; memory falls, and the loss is the number of the step."""
    return [
        {name: 10 * value for name in running.FIGURES}
        | {
            "seconds": value,
            "peak_memory_gib": 9.0 - i,
            "lm_loss": float(i),
            "mfu": None,
            "allocator_retries": i,
        }
        for i, value in enumerate(seconds)
    ]


def row_of(folder: Path, records: list[dict[str, Any]], code: int | None, log: str = "") -> dict[str, Any]:
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text + '{"seconds": 1')  # the line that a kill cut off
    (folder / "log").write_text(log)
    plan: Any = SimpleNamespace(run_dir=folder, settings=SimpleNamespace(batch_size=7))
    return running.row(ASKED, plan, folder, 100.0, code)


def test_the_median_of_the_steps_after_the_warm_up(tmp_path: Path):
    """And no later ones; the memory is that of all steps, as the first may need the most."""
    (tmp_path / "start.json").write_text('{"end_of_first_step": 130.5, "device": "X"}')
    (tmp_path / "profile.json").write_text('{"kinds": {}}')
    found = row_of(tmp_path, steps(50, 40, 3, 1, 2, 60, 70), 0)
    assert found["status"] == "ok" and found["steps"] == 3 and found["micro_batch"] == 7
    assert found["seconds"] == 2 and found["tflops_per_gpu"] == 20 and found["mfu"] is None
    assert found["peak_memory_gib"] == 9.0 and found["losses"] == [0.0, 4.0]
    assert found["allocator_retries"] == 2 + 3 + 4 and "emptied its cache 9 times" in report._full(found)
    assert report._full({}) == report._full({"allocator_retries": 0}) == ""
    assert (
        found["first_step_seconds"] == 30.5 and found["device"] == "X" and found["profile"] == {"kinds": {}}
    )
    assert "error" not in found


@pytest.mark.parametrize(
    ("count", "code", "status", "error"),
    [
        (5, None, "stopped", "the time was over"),
        (4, None, "failed", "the time was over"),
        (5, 1, "failed", "ValueError: no"),
    ],
)
def test_a_run_that_did_not_end(tmp_path: Path, count: int, code: int | None, status: str, error: str):
    """One that was stopped has figures where three steps give a median; one that failed has none."""
    log = "torch.distributed.elastic.ChildFailedError: x\nValueError: no\nKeyError: later\n"
    found = row_of(tmp_path, steps(*range(1, count + 1)), code, log)
    assert (found["status"], found["error"]) == (status, error)
    assert ("seconds" in found) == ("peak_memory_gib" in found) == (status == "stopped")


def test_the_error_of_a_log():
    assert running.failure("") == "it wrote nothing"
    assert running.failure("a\nb \n") == "b"
    killed = "E1 api.py:986] failed (exitcode: -9) local_rank: 0\nx.ChildFailedError: \n======\n"
    assert running.failure(killed) == "SIGKILL ended a process, most often for want of memory"
    assert len(running.failure("ValueError: " + "x" * 900)) == 300


def test_where_the_time_goes():
    kinds = {
        "matrix products": {"seconds": 0.06, "launches": 12.0},
        "others": {"seconds": 0.02, "launches": 3.5},
    }
    kernels = [{"name": "k" * 90, "kind": "others", "seconds": 0.02, "launches": 3.5}] * 13
    row = {"label": "gla", "seq_len": 4096, "seconds": 0.1, "profile": {"kinds": kinds, "kernels": kernels}}
    shown = report._profile(row)
    assert shown.startswith("## Where the time goes: gla at 4096, 100.0 ms a step\n\n")
    assert (
        "| matrix products | 60.0 | 60.0 | 12 |\n| others | 20.0 | 20.0 | 4 |\n| nothing runs | 20.0 | 20.0 |  |"
        in shown
    )
    assert shown.count(f"| `{'k' * 80}` | 20.0 | 4 | others |") == 12
    assert "| nothing runs | 0.0 | 0.0 |" in report._profile(row | {"seconds": 0.05}), "streams side by side"


def test_what_ran_on_a_device():
    """Microseconds of the profiler, without the ranges that hold others; on a GPU without what the host did."""

    def event(key: str, kind: DeviceType, host: float, device: float, is_range: bool = False) -> Any:
        times = {"self_cpu_time_total": host, "self_device_time_total": device}
        return SimpleNamespace(key=key, device_type=kind, is_user_annotation=is_range, count=6, **times)

    events = [
        event("gemm", DeviceType.CUDA, 1e6, 3e6),
        event("aten::mm", DeviceType.CPU, 2e6, 3e6),
        event("step", DeviceType.CUDA, 9e6, 9e6, is_range=True),
    ]
    profiler: Any = SimpleNamespace(key_averages=lambda: events)
    assert breakdown.device_times(profiler, on_cpu=False) == [("gemm", 3.0, 6)]
    assert breakdown.device_times(profiler, on_cpu=True) == [("gemm", 1.0, 6), ("aten::mm", 2.0, 6)]


def test_when_nothing_ran():
    """On any stream: what another stream does meanwhile is no pause, nor is what comes before the first kernel.

    The first of three steps is left out.
    """
    us = 1e-6
    spans = [
        *(("first", start * us, (start + 1) * us) for start in (0, 10, 20)),
        ("a", 100 * us, 110 * us),
        ("b", 112 * us, 200 * us),
        ("side", 120 * us, 130 * us),
        ("a", 200 * us, 210 * us),
        ("c", 1210 * us, 1300 * us),
        ("a", 1400 * us, 1410 * us),
    ]
    found = breakdown.pauses(reversed(spans), steps=3, top=2)
    lengths = {name: (round(p["seconds"] / us), p["times"]) for name, p in found["lengths"].items()}
    assert lengths == {
        "under 5 us": (1, 0.5),
        "5 to 50 us": (0, 0.0),
        "50 to 500 us": (50, 0.5),
        "longer": (500, 0.5),
    }
    assert [(p["after"], p["before"], p["times"]) for p in found["places"]] == [
        ("a", "c", 0.5),
        ("c", "a", 0.5),
    ]
    shown = "\n".join(report._pauses(found))
    assert "| longer | 0.5 | 0 |" in shown and "| `a` | `c` | 0.50 | 0.5 |" in shown
    nothing = breakdown.pauses([], steps=1)
    assert nothing["places"] == [] and len(report._pauses(nothing)) == 2


def test_spans_of_a_device():
    """Seconds, and only what the device did."""

    def event(name: str, kind: DeviceType, start: float, is_range: bool = False) -> Any:
        place = SimpleNamespace(start=start, end=start + 5e5)
        return SimpleNamespace(name=name, device_type=kind, time_range=place, is_user_annotation=is_range)

    events = [
        event("gemm", DeviceType.CUDA, 1e6),
        event("aten::mm", DeviceType.CPU, 2e6),
        event("step", DeviceType.CUDA, 0.0, is_range=True),
    ]
    profiler: Any = SimpleNamespace(events=lambda: events)
    assert breakdown.device_spans(profiler) == [("gemm", 1.0, 1.5)]


def test_kernels_of_a_step_by_kind():
    times = [("nccl_all_reduce", 0.4, 4), ("gemm_a", 1.0, 8), ("gemm_b", 3.0, 2), ("what", 0.2, 2)]
    found = breakdown.breakdown(times, steps=2, top=3)
    kind = breakdown.kind_of("gemm_a")
    assert next(iter(found["kinds"])) == kind != breakdown.kind_of("what")
    assert found["kinds"][kind] == {"seconds": 2.0, "launches": 5.0}
    assert [kernel["name"] for kernel in found["kernels"]] == ["gemm_b", "gemm_a", "nccl_all_reduce"]
    assert found["kernels"][0] == {"name": "gemm_b", "kind": kind, "seconds": 1.5, "launches": 1.0}


def test_figures_are_not_lost_to_a_failure(tmp_path: Path):
    """Of a run that was stopped with figures, and measured again without success; a later success replaces it."""
    (asked,) = sweep(Sweep.of(step.parser().parse_args(["--models", "gla", "--seq-lens", "2048"])))
    results = report.Results(tmp_path, "a command", again=False)
    for status, kept in (
        *(("failed", "failed"), ("not begun", "not begun"), ("stopped", "stopped")),
        *(("failed", "stopped"), ("not begun", "stopped"), ("ok", "ok")),
    ):
        results.add(asked, {"status": status, "error": "x"})
        assert [row["status"] for row in results.rows] == [kept], status

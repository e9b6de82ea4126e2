"""The fused operators on one GPU in one call: are they right, how fast, how much memory, how long the first call takes.

Everything is called through ``linear_moe.kernels``, so that an operator comes in with its backend. Beside it, where
they import: flash-linear-attention (its wheels may lie in a folder of PYTHONPATH) and torch's softmax attention. Times
are medians of CUDA graph replays, or of single launches where something waits for the host, and say which. A failure is
a row like any other, and the rest goes on; so does the rest when ``--minutes`` are over, as rows that say so.

    PYTHONPATH=. python benchmarks/kernels.py --json OUT.json [--families gla ...] [--shapes 2k ...] [--minutes 8]
                                              [--parts right time memory cold] [--sweep] [--smoke]

``--sweep`` tries the neighbours of every entry of the configuration tables, one at a time, and prints what was faster.
``--smoke`` runs it all in tiny sizes, on a CPU too, to see that it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import subprocess
import sys
import time
import traceback
import typing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["LINEAR_MOE_KERNELS"] = os.environ.get("LINEAR_MOE_KERNELS", "triton")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
import triton.testing
from kernel_calls import (
    FAMILIES,
    SHAPES,
    SMOKE,
    Family,
    Shape,
    calls,
    floor,
    inputs,
    ours,
    peer,
    results,
    softmax,
)
from torch import Tensor

from linear_moe import kernels
from linear_moe.kernels import dispatch, reference

ROOT = Path(__file__).parents[1]
RMS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (3e-3, 5e-3)}
"""Allowed relative error of outputs and states, and of gradients."""
OF_SCALED_OUTPUTS = 4e-3
"""bfloat16's, where single elements decay: docs/kernels.md says why."""
PARTS = ("right", "time", "memory", "cold")


def median(run: Callable[[], Any], is_smoke: bool) -> tuple[float, str]:
    """Milliseconds, and how they were taken."""
    if not torch.cuda.is_available() or is_smoke:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start), "once"
    run()
    torch.cuda.synchronize()
    try:
        return triton.testing.do_bench_cudagraph(run, rep=100, return_mode="median"), "graph"
    except Exception:  # something in it waits for the host
        torch.cuda.synchronize()
        return triton.testing.do_bench(run, warmup=50, rep=200, return_mode="median"), "launches"


def small(shape: Shape) -> Shape:
    """What a token loop can do."""
    return dataclasses.replace(shape, batch=min(shape.batch, 2), tokens=min(shape.tokens, 300), heads=2)


def different(shapes: list[str]) -> list[str]:
    """One name for each shape that is still another one when it is small."""
    return list({small((SHAPES | SMOKE)[name]): name for name in reversed(shapes)}.values())[::-1]


def is_right(family: Family, shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Relative RMS errors against the token loop in float64 on the same values."""
    named = inputs(family, shape, dtype, device)
    found, truth = (
        results(getattr(module, family.op), {n: to(x) for n, x in named.items()}, shape.keys**-0.5)
        for module, to in (
            (kernels, lambda x: x),
            (reference, lambda x: x.double() if x.is_floating_point() else x),
        )
    )
    errors = {
        name: ((found[name].double() - x).norm() / x.norm().clamp(min=1e-30)).item()
        for name, x in truth.items()
    }
    of_outputs, of_gradients = RMS[dtype]
    if dtype == torch.bfloat16 and family.decay in ("vector", "values"):
        of_outputs = OF_SCALED_OUTPUTS
    bad = {n: e for n, e in errors.items() if not e <= (of_gradients if n.startswith("grad") else of_outputs)}
    return {"worst": max(errors.values()), "errors": errors, "bad": sorted(bad)}


def peak(run: Callable[[], Any], forward: Callable[[], Tensor]) -> float:
    """MiB above what was there before, the output, and what the call returns."""
    run()
    o = forward()
    size = o.numel() * o.element_size()
    del o
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = run()
    kept = size + sum(x.numel() * x.element_size() for x in returned if x is not None)
    return (torch.cuda.max_memory_allocated() - before - kept) / 2**20


COLD = """
import sys, time, torch
sys.path[:0] = [{root!r}, {here!r}]
import kernel_calls as bench
family, shape = bench.FAMILIES[{family!r}], bench.Shape(*{shape!r})
named = bench.inputs(family, shape, torch.bfloat16, "cuda")
torch.cuda.synchronize()
start = time.perf_counter()
bench.calls(bench.{who}(family, shape), named)[1]()
torch.cuda.synchronize()
print("seconds", time.perf_counter() - start)
"""


def cold(name: str, shape: Shape, who: str, folder: Path) -> dict[str, float]:
    """Seconds of the first forward and backward pass with an empty compile cache, in a process of its own."""
    here = str(Path(__file__).parent)
    code = COLD.format(root=str(ROOT), here=here, family=name, shape=dataclasses.astuple(shape), who=who)
    cache = {"TRITON_CACHE_DIR": str(folder / f"{who}-{name}-{time.time_ns()}")}
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | cache, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr[-800:])
    return {"seconds": float(run.stdout.split("seconds")[-1])}


def tables() -> Iterator[tuple[Any, str]]:
    """Every function of the configuration modules that gives warps and stages."""
    from linear_moe.kernels.triton import configs

    modules = [configs]
    try:
        from linear_moe.kernels.triton import delta_configs

        modules.append(delta_configs)
    except ImportError:
        pass
    for module in modules:
        for name, function in inspect.getmembers(module, inspect.isfunction):
            result = typing.get_type_hints(function).get("return")
            if (
                function.__module__ == module.__name__
                and not name.startswith("_")
                and hasattr(result, "__dataclass_fields__")
                and "num_warps" in result.__dataclass_fields__
            ):
                yield module, name


def neighbours(entry: Any) -> Iterator[Any]:
    """Other warps and stages, and blocks of columns of half and of twice the width."""
    for width in ("values", "columns"):
        if getattr(entry, width, 0):
            for value in (getattr(entry, width) // 2, getattr(entry, width) * 2):
                if 16 <= value <= 128:
                    yield dataclasses.replace(entry, **{width: value})
    for warps in (2, 4, 8):
        for stages in (1, 2, 3):
            if (warps, stages) != (entry.num_warps, entry.num_stages):
                yield dataclasses.replace(entry, num_warps=warps, num_stages=stages)


def sweep(family: Family, shape: Shape, named: dict[str, Tensor], bench: Bench) -> list[dict[str, Any]]:
    """Change one entry at a time; milliseconds of forward with backward, fastest first."""
    found = []
    for module, name in tables():
        original, seen = getattr(module, name), {}

        def record(*args: Any, original: Any = original, seen: Any = seen, **kwargs: Any) -> Any:
            entry = original(*args, **kwargs)
            seen[entry] = None
            return entry

        with mock.patch.object(module, name, record):
            base, _ = median(calls(ours(family, shape), named)[1], bench.is_smoke)
        for entry, other in [(known, other) for known in seen for other in neighbours(known)]:
            if bench.is_over():
                return found
            swap = lambda *a, f=original, e=entry, o=other, **k: o if f(*a, **k) == e else f(*a, **k)  # noqa: E731
            row = {
                "table": f"{module.__name__.rpartition('.')[2]}.{name}",
                "from": str(entry),
                "to": str(other),
            }
            try:
                with mock.patch.object(module, name, swap):
                    ms, _ = median(calls(ours(family, shape), named)[1], bench.is_smoke)
                found.append({**row, "ms": ms, "base": base})
            except Exception as problem:  # too much shared memory, say
                found.append({**row, "failed": _short(problem), "base": base})
            if bench.is_smoke:
                return found
    return sorted(found, key=lambda row: row.get("ms", 1e9) / row["base"])


@dataclasses.dataclass
class Bench:
    """Rows so far, and the time left."""

    minutes: float
    is_smoke: bool
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    start: float = dataclasses.field(default_factory=time.monotonic)

    def is_over(self) -> bool:
        """Whether the minutes are."""
        return time.monotonic() - self.start > 60 * self.minutes

    def row(
        self, part: str, family: str, shape: str, who: str, measure: Callable[[], dict[str, Any]]
    ) -> None:
        """Measure, or say why not; print one line."""
        found: dict[str, Any] = {"part": part, "family": family, "shape": shape, "who": who}
        try:
            found |= {"skipped": "out of time"} if self.is_over() else measure()
        except ImportError as problem:
            found["skipped"] = str(problem)
        except Exception as problem:
            traceback.print_exc()
            found["failed"] = _short(problem)
        self.rows.append(found)
        text = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in found.items()
            if key not in ("part", "family", "shape", "who", "errors")
        )
        print(f"{part:7}{family:16}{shape:12}{who:8}{text}", flush=True)


def _short(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"


def timed(
    family: Family, shape: Shape, who: str, named: dict[str, Tensor], parts: list[str], bench: Bench
) -> dict[str, Any]:
    """Milliseconds forward and with backward, over the floor where it is ours, and peak memory."""
    run = {"ours": ours, "peer": peer}[who](family, shape) if who != "softmax" else softmax(shape)
    forward, both = calls(run, named)
    found: dict[str, Any] = {}
    if "time" in parts:
        found["forward_ms"], found["how"] = median(forward, bench.is_smoke)
        found["both_ms"], found["how"] = median(both, bench.is_smoke)
        if who == "ours":
            found["floor_ms"] = floor(family, shape)[1]
            found["over_floor"] = found["both_ms"] / found["floor_ms"]
    if "memory" in parts and torch.cuda.is_available():
        found["peak_MiB"] = peak(both, forward)
    if who == "peer" and family.decay == "scalar":
        found["note"] = "result wrong on this compiler"
    return found


def measure_shape(name: str, shape_name: str, device: str, parts: list[str], bench: Bench) -> None:
    """Ours and the peer's."""
    family, shape = FAMILIES[name], (SHAPES | SMOKE)[shape_name]
    named = inputs(family, shape, _dtype(device), device)
    arguments = {**named, "scale": 1.0}
    backend, _ = dispatch.pick(
        family.op, torch.device(device), _dtype(device), lambda b: b.takes(**arguments)
    )
    if backend.name != "triton" and not bench.is_smoke:
        return bench.row("time", name, shape_name, "ours", lambda: {"skipped": f"runs on {backend.name}"})
    for who in ("ours", "peer"):
        bench.row("time", name, shape_name, who, partial(timed, family, shape, who, named, parts, bench))


def measure_softmax(shape_name: str, device: str, parts: list[str], bench: Bench) -> None:
    """torch's attention, for comparison."""
    shape = (SHAPES | SMOKE)[shape_name]
    named = inputs(Family("diag_decay"), shape, _dtype(device), device)
    named = {name: x.transpose(1, 2).contiguous() for name, x in named.items() if name in ("q", "k", "v")}
    run = partial(timed, Family("diag_decay"), shape, "softmax", named, parts, bench)
    bench.row("time", "softmax", shape_name, "torch", run)


def measure(asked: argparse.Namespace, bench: Bench) -> None:
    """Every part asked for: right first, since a wrong kernel has no speed."""
    device = "cuda" if torch.cuda.is_available() and not asked.smoke else "cpu"
    shapes = [name for name in (SMOKE if asked.smoke else SHAPES) if not asked.shapes or name in asked.shapes]
    families = [name for name in FAMILIES if not asked.families or name in asked.families]
    pairs = [(name, shape_name) for shape_name in shapes for name in families]
    for name, shape_name in (
        [(n, s) for s in different(shapes) for n in families] if "right" in asked.parts else ()
    ):
        for dtype in [torch.float32] if device == "cpu" else [torch.bfloat16, torch.float32]:
            run = partial(is_right, FAMILIES[name], small((SHAPES | SMOKE)[shape_name]), dtype, device)
            bench.row("right", name, f"{shape_name} {str(dtype)[6:]}", "ours", run)
    for name, shape_name in pairs if asked.sweep else ():
        bench.row("sweep", name, shape_name, "ours", partial(swept, name, shape_name, device, bench))
    if {"time", "memory"} & set(asked.parts):
        for shape_name in shapes:
            for name in families:
                measure_shape(name, shape_name, device, asked.parts, bench)
            if "packed" not in shape_name:
                measure_softmax(shape_name, device, asked.parts, bench)
    if "cold" in asked.parts and device == "cuda":
        for name in families:
            for who in ("ours", "peer"):
                run = partial(cold, name, SHAPES["2k"], who, asked.cache)
                bench.row("cold", name, "2k", who, run)


def swept(name: str, shape_name: str, device: str, bench: Bench) -> dict[str, Any]:
    """The dozen best changes."""
    shape = (SHAPES | SMOKE)[shape_name]
    named = inputs(FAMILIES[name], shape, _dtype(device), device)
    return {"best": sweep(FAMILIES[name], shape, named, bench)[:12]}


def _dtype(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def main() -> int:
    """Everything asked for, a JSON file, and 1 if something failed or was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES))
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES, *SMOKE])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument(
        "--cache", type=Path, default=Path("/tmp/linear_moe_cold"), help="of compiled kernels"
    )
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    asked = parser.parse_args()
    bench = Bench(asked.minutes, asked.smoke)
    measure(asked, bench)
    wrong = [row for row in bench.rows if ("failed" in row and row["who"] == "ours") or row.get("bad")]
    print(f"{len(bench.rows)} rows, {len(wrong)} failed or wrong")
    if asked.json:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        about = {
            "date": time.strftime("%F"),
            "device": device,
            "torch": torch.__version__,
            "triton": triton.__version__,
        }
        asked.json.write_text(json.dumps({**about, "command": sys.argv, "rows": bench.rows}, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

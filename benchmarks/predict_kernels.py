"""What the fused kernels may cost on an H100, from their machine code: no GPU is needed, and nothing is timed.

Every kernel that a call of ``linear_moe.kernels`` launches, forward and backward, at the shapes of the benchmark
(``linear_moe.bench kernels``) is compiled for sm_90a with Triton's own assembler and disassembled; one program of its
grid is executed as far as it is integers (``emulator/sass.py``: branches, trip counts, addresses), and its instructions
are put through a coarse model of a multiprocessor (``emulator/timing.py``). In milliseconds, for each kernel:

    bytes    what the grid reads and writes, once each, over 3.02 TB/s        l2  what its programs ask of the L2 cache
    issue    instructions, one a cycle for each of four schedulers            mufu, tensor  of these units
    shared   passes over the banks of shared memory, with their conflicts, and what products read there
    latency  one program alone on a multiprocessor, times the waves of programs
    model    programs as they fit a multiprocessor, in order, with the machine code's own stalls and scoreboards
    estimate the largest of bytes, l2 and model, plus 2 us for the launch

It is to find what is fat, not to report a time. Of flash-linear-attention's kernels it predicts 0.5 to 1.4 times what
was measured forward and 0.5 to 1 times what was measured with backward (docs/kernels.md): it is an optimist about
memory, and knows neither launches by the host, nor the operations of torch between the kernels.

    PYTHONPATH=. python benchmarks/predict_kernels.py [--families gla ...] [--shapes 2k ...] [--lines diag_scan_kernel]
                                                      [--json FILE]

A call takes 2 to 10 seconds. ``--lines`` adds the lines of that kernel at which its warps wait and work most.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from compile_check import REGISTERS, SHARED, THREADS, _resources, compiling_only
from emulator import sass, timing
from torch import Tensor

from linear_moe.bench.kernels import calls

GOALS = {"linear": 0.5, "retention": 0.5, "mamba2": 0.5, "gla": 1.2, "rwkv6": 1.2, "gsa_keys": 1.2}
GOALS |= {"delta_net": 1.3, "gated_delta_net": 1.3, "kda": 2.2}
"""Milliseconds, forward and backward (issue 4)."""
COLUMNS = ("bytes", "l2", "issue", "tensor", "mufu", "shared", "latency", "model")
STEPS, EVENTS = 2_000_000, 250_000
"""At most so many instructions of a program are executed, and scheduled; a longer one is scaled."""
LAUNCH_MS = 0.002


@dataclasses.dataclass(frozen=True)
class Launch:
    """Of a compiled kernel; ``values`` with their types."""

    kernel: Any
    grid: tuple[int, int, int]
    values: list[tuple[str, Any]]
    is_backward: bool = False


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one launch."""

    kernel: str
    is_backward: bool
    programs: int
    warps: int
    resident: int
    registers: int
    ms: dict[str, float]
    conflicts: float
    """Passes over the banks, against those without conflicts."""
    lines: dict[str, tuple[float, float]]
    """Of the source: cycles that a warp waited and worked there."""

    @property
    def estimate(self) -> float:
        """Milliseconds."""
        return max(self.ms["bytes"], self.ms["l2"], self.ms["model"]) + LAUNCH_MS


def launches(
    forward: Callable[[], Tensor], backward: Callable[[Tensor], Any], found: list[Launch] | None = None
) -> list[Launch]:
    """Everything launched, none of it run; noted in ``found`` at once."""
    found = [] if found is None else found
    is_backward = False
    with compiling_only(""):
        compile_only = triton.runtime.jit.JITFunction.run

        def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            kernel = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
            bound = next(iter(self.device_caches.values()))[4](*args, **kwargs)[0]
            values = [(kind, bound[n]) for n, kind in kernel.src.signature.items() if kind != "constexpr"]
            size = (*(grid(bound) if callable(grid) else grid), 1, 1)[:3]
            found.append(Launch(kernel, size, values, is_backward))
            return kernel

        with mock.patch.object(triton.runtime.jit.JITFunction, "run", note):
            out = forward()
            is_backward = True
            backward(out)
    return found


def predict(launch: Launch) -> Prediction:
    """From the program in the middle of the grid."""
    kernel, grid = launch.kernel, launch.grid
    warps, registers = kernel.metadata.num_warps, _resources(kernel)["REG"]
    count = grid[0] * grid[1] * grid[2]
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = SHARED[90] * 1024 // (kernel.metadata.shared + 1024)
    resident = min(by_registers, by_shared, THREADS[90] // (32 * warps), 32)
    threads = sass.Threads(_parameters(launch.values), 32 * warps, tuple(n // 2 for n in grid), grid)
    # without a decay every chunk is one of those that such kernels do not leave to others
    steps = threads.run(sass.disassemble(kernel.asm["cubin"]), STEPS, leaves="_weak" not in kernel.name)
    storages = [x.untyped_storage() for _, x in launch.values if torch.is_tensor(x)]
    tensors = sorted({x.data_ptr(): x.nbytes() for x in storages}.items())
    coster = timing.Coster([start for start, _ in tensors], 32 * warps)
    trace = coster.trace(steps)
    moved = sum(
        min(size * count, tensors[n][1])
        for part in (trace.read, trace.written)
        for n, size in part.items()
        if n >= 0
    )
    model = timing.Model(trace, warps, count, resident, min(1.0, moved / max(trace.asked * count, 1)), EVENTS)
    ms = {
        "bytes": moved / timing.BANDWIDTH * 1e3,
        "l2": trace.asked * count / (timing.L2_BYTES * timing.PROCESSORS * timing.CLOCK) * 1e3,
        **{name: model.ms_of(cycles) for name, cycles in trace.busy(warps * count).items()},
        "latency": model.ms_of(model.alone()),
        "model": model.ms_of(model.full()),
    }
    conflicts = coster.passes / max(coster.least_passes, 1)
    return Prediction(
        kernel.name, launch.is_backward, count, warps, resident, registers, ms, conflicts, model.lines
    )


def _parameters(values: list[tuple[str, Any]]) -> bytes:
    """As the driver lays them out; Triton adds two pointers."""
    out = bytearray()
    for kind, value in [*values, ("*i8", 0), ("*i8", 0)]:
        if kind.startswith("*"):
            kind, value = "u64", value.data_ptr() if torch.is_tensor(value) else 0
        size = 4 if kind.startswith("fp") else max(1, int(kind[1:]) // 8)
        code = "f" if kind.startswith("fp") else {1: "b", 2: "h", 4: "i", 8: "q"}[size]
        out += bytes(-len(out) % size)
        out += struct.pack("<" + (code.upper() if kind[0] == "u" else code), value)
    return bytes(out)


def blank(family: calls.Family, shape: calls.Shape) -> dict[str, Tensor]:
    """Inputs of the whole shape, all zeros: memory that nobody touches."""
    few = dataclasses.replace(shape, batch=1, tokens=32, documents=0)
    lead = shape.batch, shape.tokens
    return {
        name: torch.zeros(*lead, *x.shape[2:], dtype=x.dtype) if x.ndim > 2 else x
        for name, x in calls.inputs(family, few, torch.bfloat16, "cpu").items()
    }


def passes(run: calls.Operator, named: dict[str, Tensor], found: list[Launch] | None = None) -> list[Launch]:
    """Forward and backward, in this order."""
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in named.items()}
    wanted = [x for x in leaves.values() if x.requires_grad]
    return launches(
        lambda: run(**leaves)[0],
        lambda o: torch.autograd.grad(o, wanted, torch.zeros_like(o), allow_unused=True),
        found,
    )


def show(name: str, found: list[Prediction], goal: float | None, lines: str | None) -> None:
    """A row for each kernel, and their sum."""
    print(
        f"{name}\n    {'':34} programs  on  " + " ".join(f"{x:>7}" for x in COLUMNS) + "  estimate  conflicts"
    )
    for row in found:
        label = f"{row.kernel.removesuffix('_kernel'):.26} {'bwd' if row.is_backward else 'fwd'} {row.warps}w"
        numbers = " ".join(f"{row.ms[x]:7.3f}" for x in COLUMNS)
        print(
            f"    {label:34} {row.programs:8} {row.resident:3}  {numbers} {row.estimate:9.3f} {row.conflicts:10.2f}"
        )
        if lines and lines in row.kernel:
            for where, (wait, work) in sorted(row.lines.items(), key=lambda x: -sum(x[1]))[:24]:
                print(f"        {where:34} waits {wait:9.0f}  works {work:9.0f}")
    forward = sum(row.estimate for row in found if not row.is_backward)
    total = sum(row.estimate for row in found)
    told = f", goal {goal}" if goal else ""
    print(f"    forward {forward:.2f}, with backward {total:.2f} ms{told}\n", flush=True)


def main() -> int:
    """Every combination asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=list(calls.FAMILIES), default=[*GOALS, "rwkv7"])
    parser.add_argument("--shapes", nargs="+", choices=list(calls.SHAPES), default=["2k", "16k", "64"])
    parser.add_argument("--lines", help="kernel of which to show the lines that cost most")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    everything: dict[str, list[dict[str, Any]]] = {}
    for family_name in asked.families:
        for shape_name in asked.shapes:
            family, shape = calls.FAMILIES[family_name], calls.SHAPES[shape_name]
            found = [predict(x) for x in passes(calls.ours(family, shape), blank(family, shape))]
            show(f"{family_name}, {shape_name}: {shape}", found, GOALS.get(family_name), asked.lines)
            rows = [dataclasses.asdict(x) | {"estimate": x.estimate} for x in found]
            everything[f"{family_name} {shape_name}"] = [
                {k: v for k, v in x.items() if k != "lines"} for x in rows
            ]
    if asked.json:
        asked.json.write_text(json.dumps(everything, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

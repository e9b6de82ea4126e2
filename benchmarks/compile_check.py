"""Compile the fused kernels for Hopper (sm_90) or another GPU anywhere, and read what they take: no GPU is needed.

Every operator is called through ``linear_moe.kernels``, forward and backward, on small CPU tensors, with a driver that
only says that there is such a GPU: Triton compiles what it would launch there, with the shipped block sizes, and
launches nothing. A row for each kernel: registers of a thread, bytes of spilled stores and loads, shared memory of a
program, programs that fit one multiprocessor by registers, shared memory and warps, seconds to compile.

    PYTHONPATH=. python benchmarks/compile_check.py [--ops diag_decay ...] [--dtypes bfloat16 ...] [--dims 128x128 ...]
                                                    [--kinds vector ...] [--arch 80] [--json FILE]

The exit code is 1 if a kernel spills, takes more shared memory than a program can have, or has a construct that Triton
miscompiles.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)
os.environ["LINEAR_MOE_KERNELS"] = "triton"

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler

from linear_moe import kernels
from linear_moe.kernels import assembler, dispatch
from linear_moe.kernels.triton import configs

REGISTERS = 65536
"""Of a multiprocessor."""
SHARED = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
"""KiB of a multiprocessor of each architecture; a program can have all but one."""
THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
"""Of a multiprocessor."""
KINDS = {
    "diag_decay": ("none", "head", "scalar", "vector", "bonus", "values"),
    "delta_rule": ("none", "scalar", "vector"),
    "diag_decay_segment": ("none", "head", "scalar", "vector", "values"),
    "delta_rule_segment": ("none", "scalar", "vector"),
    "dplr_delta_rule": ("vector",),
    "dplr_delta_rule_segment": ("vector",),
}
"""Decays of each operator, for which there are kernels of their own; a fused backend need not take them all."""
AROUND = {
    "rotate_heads": ("",),
    "log_decay_of": ("softplus", "log_sigmoid", "sigmoid", "exp"),
    "bounded_decay_of": ("",),
    "lerp_tokens": ("weight", "logits", "share"),
    "edit_keys": ("",),
    "gated_group_norm": ("alone", "own"),
    "conv_and_split": ("",),
    "rms_norm": ("", "wide"),
    "skip_gate_norm": ("skip", "alone", "wide"),
    "adam_": ("",),
    "grouped_weight_grad_": ("",),
}
"""Other operators, and what kinds there are: of heads K wide, V channels are turned, or read of its own by a token; K
are convolved, V more are not; a parameter's copy has the dtype, but for float32; experts have 4 K inputs and 8 V
outputs."""
STEP = dict(lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, factor=0.3)
"""Of an optimizer."""
DIMS = ("64x64", "128x128", "128x256", "256x128", "256x256")


@dataclasses.dataclass(frozen=True)
class Row:
    """What one kernel of one call takes."""

    call: str
    kernel: str
    flags: str
    warps: int
    stages: int
    registers: int
    spilled: int
    """Bytes, stores and loads."""
    shared: int
    resident: int
    """Programs that fit one multiprocessor."""
    seconds: float
    arch: int = 90
    miscompiled: int = 0
    """Places where Triton is known to make wrong code of what the kernel asks."""

    @property
    def is_bad(self) -> bool:
        """It spills, cannot be launched, or would be wrong."""
        return self.spilled > 0 or self.miscompiled > 0 or self.shared > (SHARED[self.arch] - 1) * 1024


@dataclasses.dataclass(frozen=True)
class _Driver:
    """As far as Triton's compiler asks one."""

    arch: int

    def get_current_device(self) -> int:
        """The first of one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Nothing is launched there."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """90 is an H100 or H200."""
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def compiling_only(call: str, arch: int = 90) -> Iterator[list[Row]]:
    """Kernels launched within are compiled, appended to the list, and not run."""
    rows: list[Row] = []
    seen: set[str] = set()
    run = triton.runtime.jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        start = time.perf_counter()
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            rows.append(_row(call, kernel, kwargs, time.perf_counter() - start, arch))
        return kernel

    if arch == 90:
        assembler.obstacle()  # sets the one that runs there, if it is installed
    obstacle = lambda device, dtype: None  # noqa: E731  # compiled only
    table = {
        op: tuple(dataclasses.replace(b, obstacle=obstacle) if b.name == "triton" else b for b in backends)
        for op, backends in dispatch.BACKENDS.items()
    }
    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver(arch))
    try:
        with (
            mock.patch.object(triton.runtime.jit.JITFunction, "run", compile_only),
            mock.patch.dict(dispatch.BACKENDS, table),
            mock.patch.object(configs, "num_processors", lambda device: 132),
            mock.patch.object(configs, "has_wgmma", lambda: arch == 90),
        ):
            yield rows
    finally:
        triton.runtime.driver._active = active


def check(
    op: str, kind: str, dtype: torch.dtype, dims: str, packed: bool = False, arch: int = 90
) -> list[Row]:
    """Forward and backward of one call; an optimizer's step, with either weight decay; sums, written and added to."""
    num_keys, num_values = (int(n) for n in dims.split("x"))
    name = f"{op} {kind} {str(dtype).removeprefix('torch.')} {dims}{' packed' if packed else ''}"
    if op == "adam_":
        with compiling_only(name, arch) as rows:
            for decoupled in (False, True):
                kernels.adam_(**parameter(5000, dtype), **STEP, decoupled=decoupled)
        return rows
    if op == "grouped_weight_grad_":
        with compiling_only(name, arch) as rows:
            for add in (False, True):
                kernels.grouped_weight_grad_(**gradient(8 * num_values, 4 * num_keys, dtype), add=add)
        return rows
    make = _around if op in AROUND else _inputs
    inputs = make(op, kind, dtype, num_keys, num_values, packed)
    with compiling_only(name, arch) as rows:
        if op.endswith("_segment"):
            segment = getattr(kernels, op)(**inputs)
            found = [segment.state, segment.log_decay, segment.decay]
        else:
            found = getattr(kernels, op)(**inputs, **({} if op in AROUND else {"scale": 0.5}))
        found = [x for x in ([found] if isinstance(found, Tensor) else found) if x is not None]
        leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
        torch.autograd.grad(found, leaves, [torch.zeros_like(x) for x in found])
    return rows


def _inputs(
    op: str, kind: str, dtype: torch.dtype, num_keys: int, num_values: int, packed: bool
) -> dict[str, Tensor]:
    """Long enough for segments; a call with a state and every gradient."""
    shape = 1, 2048, 16
    ones = lambda *s, dtype=dtype: torch.zeros(*s, dtype=dtype).requires_grad_()  # noqa: E731
    inputs = {"k": ones(*shape, num_keys), "v": ones(*shape, num_values)}
    if not op.endswith("_segment"):
        inputs["q"] = ones(*shape, num_keys)
    decays = {"head": shape[2:], "scalar": shape, "vector": (*shape, num_keys), "bonus": (*shape, num_keys)}
    if kind in decays:
        inputs["log_decay"] = ones(*decays[kind], dtype=torch.float32)
    if kind == "values":
        inputs["log_decay_v"] = ones(*shape, num_values, dtype=torch.float32)
    if kind == "bonus":
        inputs["bonus"] = ones(shape[2], num_keys, dtype=torch.float32)
    if op.startswith("delta_rule"):
        inputs["beta"] = ones(*shape)
    if op.startswith("dplr_delta_rule"):
        inputs["a"], inputs["b"] = ones(*shape, num_keys), ones(*shape, num_keys)
    if not op.endswith("_segment"):
        documents = 2 if packed else 1
        inputs["state"] = ones(documents, shape[2], num_keys, num_values, dtype=torch.float32)
    if packed:
        inputs["cu_seqlens"] = torch.tensor([0, 300, 2048], dtype=torch.int32)
    return inputs


def _around(
    op: str, kind: str, dtype: torch.dtype, num_keys: int, num_values: int, packed: bool
) -> dict[str, Any]:
    """Slices of a fused projection, of what stands around a recurrence. The convolution alone takes documents."""
    heads = 16
    wide = torch.zeros(1, 2048, heads, num_keys + num_values, dtype=dtype)
    ones = lambda *s: torch.zeros(*s, dtype=dtype).requires_grad_()  # noqa: E731
    x = wide[..., :num_keys].requires_grad_()
    if op == "rotate_heads":
        q, k, _ = torch.zeros(1, 2048, 20, num_keys, dtype=dtype).split([16, 2, 2], dim=2)
        angles = torch.zeros(1, 2048, min(num_keys, num_values) // 2)
        return {"q": q.requires_grad_(), "k": k.requires_grad_(), "angles": angles}
    if op == "log_decay_of":
        has_rate = {"rate": ones(heads), "bias": ones(heads, num_keys)} if kind == "softplus" else {}
        return {"x": x, "form": kind, **has_rate}
    if op == "bounded_decay_of":
        return {"x": x, "bound": torch.zeros(heads, num_keys).requires_grad_()}
    if op == "lerp_tokens":
        mixes = {"weight": 6, "logits": 5, "share": 1}[kind]
        given = {"weight": None if kind == "share" else ones(mixes, heads * num_keys)}
        given |= {} if kind == "weight" else {"logits": ones(1, 2048, mixes, heads * num_keys)}
        given |= {"activation": "sigmoid"} if kind == "share" else {}
        return {"x": ones(1, 2048, heads * num_keys), "other": ones(1, 2048, heads * num_keys), **given}
    if op == "rms_norm":
        width = 8 * num_keys if kind == "wide" else num_keys
        return {"x": ones(1, 2048, width), "weight": ones(width)}
    if op == "edit_keys":
        return {"k": x, "logits": x, "scale": ones(heads, num_keys), "strength": ones(heads, num_keys)}
    if op == "gated_group_norm":
        keys = ones(1, 2048, heads, num_keys)
        x = wide[..., num_keys:].requires_grad_()
        own = {"q": keys, "k": keys, "v": x, "bonus": ones(heads, num_keys)} if kind == "own" else {}
        weights = {"weight": ones(heads, num_values), "bias": ones(heads, num_values)}
        return {"x": x, **weights, "gate": x, "activation": None if own else "swish", **own}
    if op == "conv_and_split":
        widths = num_keys // 2, num_keys // 2, num_values
        found = {"x": wide.requires_grad_(), "weight": ones(heads, num_keys, 4), "widths": widths}
        if packed:
            bounds = torch.tensor([0, 300, 2048], dtype=torch.int32)
            found |= {
                "bias": ones(heads, num_keys),
                "state": ones(2, 3, heads, num_keys),
                "cu_seqlens": bounds,
            }
        return {**found, "activation": "silu"}
    if kind == "wide":  # as mamba2 2.7B has them
        heads = 5120 // num_keys
        x = torch.zeros(1, 2048, heads, num_keys + num_values, dtype=dtype)[..., :num_keys].requires_grad_()
    skip = {} if kind == "alone" else {"skip": x, "skip_weight": ones(heads), "gate": x}
    return {"x": x, "skip": None, "skip_weight": None, "weight": ones(heads, num_keys), **skip}


def parameter(size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """With moments after two steps, the third one's gradient, and a copy unless that would be float32."""
    found = {name: torch.randn(size) for name in ("param", "grad", "exp_avg")}
    found |= {"exp_avg_sq": torch.rand(size), "step": torch.tensor(3.0)}
    return found if dtype == torch.float32 else found | {"half": torch.zeros(size, dtype=dtype)}


def gradient(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of three experts' weights, one of which has no tokens."""
    normal = lambda *shape: torch.randn(*shape).to(dtype)  # noqa: E731
    found = {"total": torch.randn(3, num_outputs, num_inputs), "dy": normal(300, num_outputs)}
    return found | {"x": normal(300, num_inputs), "ends": torch.tensor([170, 170, 299], dtype=torch.int32)}


def _row(call: str, kernel: Any, kwargs: dict[str, Any], seconds: float, arch: int) -> Row:
    found = _resources(kernel)
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    registers = found["REG"]
    per_program = -(-registers // 8) * 8 * 32 * warps
    by_shared, by_threads = SHARED[arch] * 1024 // (shared + 1024), THREADS[arch] // (32 * warps)
    resident = min(REGISTERS // per_program, by_shared, by_threads)
    flags = " ".join(
        name if value is True else f"{name}={value}"
        for name, value in kwargs.items()
        if value is True or (name in ("BK", "BV", "BD", "BZ", "C") and isinstance(value, int))
    )
    spilled = _spilled(kernel, arch) if found["STACK"] else 0
    return Row(
        call, kernel.name, flags, warps, kernel.metadata.num_stages, registers, spilled, shared, resident, seconds,
        arch, _miscompiled(kernel.asm["ttgir"]) if arch == 90 else 0,
    )  # fmt: skip


def _miscompiled(ttgir: str) -> int:
    """Tiles of two defects of Triton on sm_90 that its interpreter does not have.

    A product of matrices that is transposed in registers is said to be stored in the wrong order (3.4 to 3.7.0,
    fla-org/flash-linear-attention#826); one that was only reshaped still has neighbours of a row in order. A load in a
    pipelined loop that feeds registers as well as a product has one buffer, which is filled for the next turn while the
    asynchronous product may still read it (3.6).
    """
    in_order = re.findall(r"(#linear\d*) = #ttg\.linear<\{register = \[\[0, 1\]", ttgir)
    stored = re.findall(r"ttg\.local_alloc %\S+ : \(tensor<\w+x(?:bf|f)16, (#linear\d*)>\)", ttgir)
    transposed = [layout for layout in stored if layout not in in_order]
    single = set(re.findall(r"(%\S+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<1x", ttgir))
    indexed = re.findall(r"(%\S+) = ttg\.memdesc_index (%\w+)\[", ttgir)
    tiles = {tile for tile, buffer in indexed if buffer in single}
    tiles |= {
        view for view, tile in re.findall(r"(%\S+) = ttg\.memdesc_trans (%\S+) ", ttgir) if tile in tiles
    }
    waits = re.findall(r"warp_group_dot_wait (.*) \{pendings = [1-9]", ttgir)
    return len(transposed) + sum(tile in tiles for wait in waits for tile in wait.split(", "))


def _resources(kernel: Any) -> dict[str, int]:
    """Of the machine code: registers, stack frame, static shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        dump = _nvidia("cuobjdump", "--dump-resource-usage", file.name).stdout
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", dump.split("Function", 1)[1])}


def _spilled(kernel: Any, arch: int) -> int:
    """Bytes of spilled stores and loads, from the assembler: a stack frame alone may be something else."""
    ptxas = compiler.get_ptxas(arch)
    option = "--regAllocOptLevel=2"  # as Triton calls it: 3.9 with this, 3.6 without, whatever the assembler
    options = [option] if option in inspect.getsource(compiler) else []
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(kernel.asm["ptx"])
        options += ["-v", f"--gpu-name={compiler.sm_arch_from_capability(arch)}", "-o", str(target)]
        command = [ptxas.path, *options, str(source)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))


def _nvidia(tool: str, *args: str) -> subprocess.CompletedProcess[str]:
    path = Path(triton.__file__).with_name("backends") / "nvidia" / "bin" / tool
    return subprocess.run([str(path), *args], capture_output=True, text=True, check=True)


def show(rows: list[Row]) -> None:
    """The table."""
    for row in rows:
        mark = " <- BAD" if row.is_bad else ""
        print(
            f"{row.call:38} {row.kernel:32} {row.warps} warps {row.stages} stages {row.registers:3} registers "
            f"{row.spilled:5} spilled {row.shared / 1024:6.1f} KiB {row.resident} resident {row.seconds:5.1f} s "
            f"{row.flags}{f' {row.miscompiled} miscompiled' if row.miscompiled else ''}{mark}",
            flush=True,
        )


def main() -> int:
    """Every combination asked for; one that fails is reported, and the rest go on."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", default=[*KINDS, *AROUND], choices=[*KINDS, *AROUND])
    parser.add_argument("--kinds", nargs="+", help="decays; all by default")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--dims", nargs="+", default=list(DIMS), help="KxV")
    parser.add_argument("--packed", action="store_true", help="packed documents instead of rows")
    parser.add_argument("--arch", type=int, default=90, choices=list(SHARED), help="compute capability")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows: list[Row] = []
    failed = []
    for op in asked.ops:
        for kind in {**KINDS, **AROUND}[op]:
            if op in KINDS and asked.kinds and kind not in asked.kinds:
                continue
            for dtype in asked.dtypes:
                for dims in asked.dims:
                    try:
                        found = check(op, kind, getattr(torch, dtype), dims, asked.packed, asked.arch)
                    except Exception:  # the rest goes on
                        failed.append(f"{op} {kind} {dtype} {dims}")
                        print(f"{failed[-1]} FAILED\n{traceback.format_exc()}", flush=True)
                        continue
                    show(found)
                    rows += found
    bad = [row for row in rows if row.is_bad]
    total = sum(row.seconds for row in rows)
    print(f"{len(rows)} kernels, {total:.0f} s to compile, {len(bad)} bad, {len(failed)} calls failed")
    if asked.json:
        found_json = {
            "triton": triton.__version__,
            "failed": failed,
            "rows": [dataclasses.asdict(r) for r in rows],
        }
        asked.json.write_text(json.dumps(found_json, indent=1) + "\n")
    return 1 if bad or failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Run the fused kernels as compiled for a GPU, without one: bfloat16, tensor cores, races, bounds.

The PTX that Triton makes is run thread by thread (``emulator/``), forward and backward, on few tokens, and compared
with chunked torch in float64. Triton's interpreter knows neither the layouts nor the barriers, copies and asynchronous
products that this checks; what the assembler makes of the PTX is not checked.

    PYTHONPATH=. python benchmarks/emulate_check.py [--ops delta_rule ...] [--kinds vector ...] [--dims 128x128 ...]
                                                    [--dtypes bfloat16 ...] [--tokens 150] [--arch 90] [--packed]

A row for each call: relative RMS errors of the results, then of the gradients, and hazards. The exit code is 1 if one
is wrong, or there is a hazard. A call takes 1 to 60 seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any
from unittest import mock

import torch
from compile_check import AROUND as COMPILED
from compile_check import KINDS, STEP, parameter  # asks for fused kernels, not interpreted
from emulator.launch import emulated
from torch import Tensor

from linear_moe import kernels
from linear_moe.kernels import dispatch

AROUND = {op: kinds for op, kinds in COMPILED.items() if op != "grouped_weight_grad_"}
"""But for experts' gradients: descriptors of tensors, by which hardware copies tiles, are not emulated."""
LIMITS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
HEAD_LIMIT = 5.0
"""Times that, for the gradient of what is one number for each head: its terms may cancel."""


def check(op: str, kind: str, dims: str, dtype: torch.dtype, tokens: int, arch: int, packed: bool) -> bool:
    """One call; whether it is right."""
    torch.manual_seed(0)
    inputs: dict[str, Any] = (
        _around(op, kind, dims, dtype, tokens, packed)
        if op in AROUND
        else {**_inputs(op, kind, dims, dtype, tokens, packed), "scale": 0.5}
    )
    wide = {name: x.double() if _is_float(x) else x for name, x in inputs.items()}
    with mock.patch.dict(os.environ, {dispatch.ENVIRONMENT_VARIABLE: "chunked"}):
        expected = _results(op, wide)
    start = time.perf_counter()
    with emulated(arch) as hazards:
        found = _results(op, inputs)
    errors = {name: _error(x, expected[name]) for name, x in found.items()}
    of_heads = {"d rate", "d skip_weight"} | ({"d log_decay"} if kind == "head" else set())
    limits = {name: LIMITS[dtype] * (HEAD_LIMIT if name in of_heads else 1) for name in errors}
    is_right = all(error <= limits[name] for name, error in errors.items()) and not hazards
    numbers = " ".join(f"{name} {error:.1e}" for name, error in errors.items())
    name = f"{op} {kind} {str(dtype).removeprefix('torch.')} {dims}{' packed' if packed else ''}"
    print(
        f"{name:45} {numbers} {time.perf_counter() - start:.0f} s{'' if is_right else ' <- BAD'}", flush=True
    )
    for hazard in sorted(hazards):
        print(f"    {hazard}", flush=True)
    return is_right


def _results(op: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Results and gradients."""
    if op == "adam_":
        written = {name: x.clone() for name, x in inputs.items()}
        kernels.adam_(**written, **STEP, decoupled=True)
        return {name: x for name, x in written.items() if name not in ("grad", "step")}
    leaves = {
        name: x.detach().clone().requires_grad_(name != "angles") if _is_float(x) else x
        for name, x in inputs.items()
    }
    if op.endswith("_segment"):
        del leaves["scale"]
        segment = getattr(kernels, op)(**leaves)
        outputs = {"state": segment.state, "decay": segment.decay, "log_decay": segment.log_decay}
    else:
        found = getattr(kernels, op)(**leaves)
        found = (found,) if isinstance(found, Tensor) else found
        names = map(str, range(len(found))) if op in AROUND else ("o", "state")
        outputs = dict(zip(names, found, strict=True))
    outputs = {name: x for name, x in outputs.items() if x is not None}
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outputs.values()]
    wanted = {name: x for name, x in leaves.items() if _is_float(x) and x.requires_grad}
    grads = torch.autograd.grad(list(outputs.values()), list(wanted.values()), upstream)
    return outputs | {f"d {name}": grad for name, grad in zip(wanted, grads)}


def _error(x: Tensor, expected: Tensor) -> float:
    """Infinite where one is not a number."""
    error = (x.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    return float("inf") if error.isnan() else error.item()


def _inputs(
    op: str, kind: str, dims: str, dtype: torch.dtype, tokens: int, packed: bool
) -> dict[str, Tensor]:
    """Two heads that share q and k; packed: four documents, one of them empty, and tokens behind the last."""
    num_keys, num_values = (int(n) for n in dims.split("x"))
    is_dplr, heads = op.startswith("dplr"), 2
    shape, groups = (1, tokens, heads), heads if is_dplr else 1
    direction = torch.nn.functional.normalize(torch.randn(1, tokens, groups, num_keys), dim=-1)
    inputs = {"k": direction, "v": torch.randn(*shape, num_values)}
    bounds = [0, tokens // 3, tokens // 3, tokens // 2, tokens - 5] if packed else [0, tokens]
    if not op.endswith("_segment"):
        inputs["q"] = torch.randn(1, tokens, groups, num_keys)
    if op.startswith("delta"):
        inputs["beta"] = torch.rand(shape)
    if is_dplr:
        inputs |= {"k": direction * 0.5, "a": -direction, "b": direction * torch.rand_like(direction)}
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    decays = {"head": shape[2:], "scalar": shape, "vector": (*shape, num_keys), "bonus": (*shape, num_keys)}
    if kind in decays:
        inputs["log_decay"] = -0.5 * torch.rand(decays[kind]).square()
    if kind == "values":
        inputs["log_decay_v"] = -0.5 * torch.rand(*shape, num_values).square()
    if kind == "bonus":
        inputs["bonus"] = torch.randn(heads, num_keys)
    if not op.endswith("_segment"):
        inputs["state"] = torch.randn(len(bounds) - 1, heads, num_keys, num_values)
    return inputs | ({"cu_seqlens": torch.tensor(bounds, dtype=torch.int32)} if packed else {})


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _around(op: str, kind: str, dims: str, dtype: torch.dtype, tokens: int, packed: bool) -> dict[str, Any]:
    """Two rows of what stands around a recurrence; rotary angles are up to a million. A parameter of the optimizer.

    The convolution alone takes packed documents, with histories and a bias then.
    """
    num_keys, num_values = (int(n) for n in dims.split("x"))
    normal = lambda *shape: torch.randn(*shape).to(dtype)  # noqa: E731
    if op == "adam_":
        return dict(parameter(9 * tokens, dtype))
    if op == "rotate_heads":
        angles = torch.rand(2, tokens, min(num_keys, num_values) // 2) ** 4 * 1e6
        q, k = (normal(2, tokens, heads, num_keys) for heads in (9, 3))
        return {"q": q, "k": k, "angles": angles, "scale": 0.5}
    if op == "log_decay_of":
        has_rate = {"rate": normal(2).abs(), "bias": normal(2, num_keys)} if kind == "softplus" else {}
        return {"x": normal(2, tokens, 2, num_keys), "form": kind, "scale": 0.5, **has_rate}
    if op == "bounded_decay_of":
        bound = torch.randn(2, num_keys) * 4
        bound[0, ::3] = -float("inf")
        return {"x": normal(2, tokens, 2, num_keys) * 4, "bound": bound}
    if op == "lerp_tokens":
        x, other = normal(2, tokens, 3 * num_keys), normal(2, tokens, 3 * num_keys)
        mixes = {"weight": 6, "logits": 5, "share": 1}[kind]
        found = {"x": x, "other": other, "activation": "sigmoid" if kind == "share" else None}
        found |= {} if kind == "share" else {"weight": normal(mixes, 3 * num_keys)}
        return found | ({} if kind == "weight" else {"logits": normal(2, tokens, mixes, 3 * num_keys)})
    if op == "edit_keys":
        found = {name: normal(2, tokens, 2, num_keys) for name in ("k", "logits")}
        return found | {name: normal(2, num_keys) for name in ("scale", "strength")}
    if op == "gated_group_norm":
        x, gate, v = (normal(2, tokens, 2, num_values) for _ in range(3))
        q, k = (normal(2, tokens, 2, num_keys) for _ in range(2))
        own = {"q": q, "k": k, "v": v, "bonus": normal(2, num_keys), "activation": None}
        found = {"x": x, "gate": gate, "weight": normal(2, num_values), "bias": normal(2, num_values)}
        return found | (own if kind == "own" else {})
    if op == "conv_and_split":
        rows, widths = 1 if packed else 2, (num_keys // 2, num_keys // 2, num_values)
        x, weight = normal(rows, tokens, 2, num_keys + num_values), normal(2, num_keys, 4)
        found = {"x": x, "weight": weight, "widths": widths, "activation": "silu"}
        if packed:
            bounds = torch.tensor([0, tokens // 3, tokens // 3, tokens // 2, tokens - 5], dtype=torch.int32)
            found |= {"bias": normal(2, num_keys), "state": normal(4, 3, 2, num_keys), "cu_seqlens": bounds}
        return found
    if op == "rms_norm":
        width = 8 * num_keys if kind == "wide" else num_keys
        return {"x": normal(2, tokens, width), "weight": normal(width)}
    heads, tokens = (5120 // num_keys, tokens // 14) if kind == "wide" else (2, tokens)
    x, weight = normal(2, tokens, heads, num_keys), normal(heads, num_keys)
    if kind == "alone":
        return {"x": x, "skip": None, "skip_weight": None, "weight": weight}
    skip, gate = normal(*x.shape), normal(*x.shape)
    return {"x": x, "skip": skip, "skip_weight": normal(heads), "weight": weight, "gate": gate}


def main() -> int:
    """Every combination asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", default=[*KINDS, *AROUND], choices=[*KINDS, *AROUND])
    parser.add_argument("--kinds", nargs="+", help="decays; all by default")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--dims", nargs="+", default=["128x128"], help="KxV")
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument(
        "--arch", type=int, default=90, choices=(80, 86, 89, 90, 120), help="compute capability"
    )
    parser.add_argument("--packed", action="store_true", help="packed documents instead of rows")
    asked = parser.parse_args()
    options: Any = asked.tokens, asked.arch, asked.packed
    wrong = [
        (op, kind)
        for op in asked.ops
        for kind in {**KINDS, **AROUND}[op]
        for dtype in asked.dtypes
        for dims in asked.dims
        if op in AROUND or not asked.kinds or kind in asked.kinds
        if not check(op, kind, dims, getattr(torch, dtype), *options)
    ]
    print(f"{len(wrong)} calls are wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Cases of the gated RMS norm; run_interpreted.py runs the fused kernel in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from scan_cases import error, gradients
from torch import Tensor

from linear_moe.kernels import reference

CASES: dict[str, dict[str, Any]] = {
    "weight, swish": dict(weight=1, gate=True),
    "weight per head, swish": dict(weight=2, gate=True),
    "weight, sigmoid": dict(weight=1, gate=True, activation="sigmoid", shape=(1, 37, 3, 48)),
    "weight alone": dict(weight=1, shape=(1, 1, 2, 200)),
    "L2 norm": dict(eps=1e-6 / 16, scale=0.25),
    "time first, slices": dict(weight=2, gate=True, strided=True),
}


def make(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of one call; one row of x is nearly zero, where eps matters."""
    case = dict(CASES[name])
    batch, tokens, heads, width = case.pop("shape", (2, 21, 3, 16))
    generator = torch.Generator().manual_seed(len(name))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    wide = normal(tokens, batch, heads, 2 * width) if case.pop("strided", False) else None
    x = normal(batch, tokens, heads, width) if wide is None else wide.transpose(0, 1)[..., :width]
    x[0, 0] *= 1e-4
    dims, has_gate = case.pop("weight", 0), case.pop("gate", False)
    gate = normal(*x.shape) if wide is None else wide.transpose(0, 1)[..., width:]
    weight = normal(heads, width) if dims == 2 else normal(width) if dims else None
    tensors = dict(x=x, weight=weight, gate=gate if has_gate else None)
    return {n: None if t is None else t.detach().requires_grad_() for n, t in tensors.items()} | case


def largest_error(name: str, run: Callable[..., Tensor], dtype: torch.dtype) -> float:
    """Output and gradients, against the definition in float64 on equal values."""
    given = make(name, dtype)
    exact = {
        n: t.detach().double().requires_grad_() if isinstance(t, Tensor) else t for n, t in given.items()
    }
    found, truth = _results(run, given), _results(reference.gated_rms_norm, exact)
    return max(error(f.double(), t) for f, t in zip(found, truth, strict=True))


def _results(run: Callable[..., Tensor], inputs: dict[str, Any]) -> list[Tensor]:
    y = run(**inputs)
    return [y, *gradients([y], {n: t for n, t in inputs.items() if isinstance(t, Tensor)}).values()]


def fused(name: str) -> float:
    """With several runs of tokens, and several tiles in a run."""
    from linear_moe.kernels.triton import gated_norm

    with mock.patch.multiple(gated_norm, RUN=16, TILE=8):
        return largest_error(name, gated_norm.gated_rms_norm, torch.float32)

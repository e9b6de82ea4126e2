"""Cases of the norm behind a skip and a gate; run_interpreted.py runs the fused kernel in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from scan_cases import errors_of
from torch import Tensor

from linear_moe.kernels import reference

CASES: dict[str, dict[str, Any]] = {
    "one group, swish": dict(gate=True),
    "three groups, sigmoid": dict(gate=True, num_groups=3, activation="sigmoid", shape=(1, 37, 6, 20)),
    "no gate": dict(num_groups=2, shape=(2, 5, 4, 24)),
    "one token, wide": dict(gate=True, shape=(1, 1, 2, 600)),
    "time first, slices": dict(gate=True, strided=True),
    "norm alone": dict(skip=False, num_groups=2, shape=(2, 21, 4, 20)),
    "no skip, time first, slices": dict(skip=False, gate=True, strided=True),
    "wider than registers": dict(gate=True, shape=(1, 9, 80, 64)),
    "wider, odd, two groups": dict(
        gate=True, num_groups=2, activation="sigmoid", shape=(1, 3, 6, 1367), strided=True
    ),
    "wider, norm alone": dict(skip=False, shape=(2, 3, 127, 64)),
}


def make(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of one call; one token is nearly zero, where eps matters."""
    case = dict(CASES[name])
    batch, tokens, heads, width = case.pop("shape", (2, 21, 3, 16))
    generator = torch.Generator().manual_seed(len(name))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    slices = normal(tokens, batch, heads, 3 * width).transpose(0, 1).split(width, dim=-1)
    if not case.pop("strided", False):
        slices = tuple(x.contiguous() for x in slices)
    x, skip, gate = slices
    x[0, 0] *= 1e-4
    skip[0, 0] *= 1e-4
    tensors = dict(x=x, skip=skip, skip_weight=normal(heads), weight=normal(heads, width))
    if not case.pop("skip", True):
        tensors |= dict(skip=None, skip_weight=None)
    if case.pop("gate", False):
        tensors["gate"] = gate
    return {n: None if t is None else t.detach().requires_grad_() for n, t in tensors.items()} | case


def errors(name: str, run: Callable[..., Tensor], dtype: torch.dtype) -> list[float]:
    """Of the output and the gradients, against the definition in float64."""
    return errors_of(run, reference.skip_gate_norm, make(name, dtype))


def fused(name: str) -> list[float]:
    """With several runs of tokens."""
    from linear_moe.kernels.triton import skip_norm

    with mock.patch.object(skip_norm, "RUN", 8):
        return errors(name, skip_norm.skip_gate_norm, torch.float32)

"""Cases of the weighted gated unit; run_interpreted.py runs the fused kernel in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
from scan_cases import errors_of
from torch import Tensor

from linear_moe.kernels import reference

CASES = {"one block": (5, 16, False), "several blocks": (3, 100, False), "slice": (4, 9, True)}
"""Rows, width, and whether rows are slices of wider ones."""


def make(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    rows, width, is_slice = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    x = torch.randn(rows, 2 * width + 5, generator=generator, dtype=torch.float64).to(dtype) * 3
    x = x[:, 2 : 2 + 2 * width]
    weight = torch.rand(rows, generator=generator, dtype=torch.float64).to(dtype)
    x = x if is_slice else x.contiguous()
    return {n: t.detach().requires_grad_() for n, t in (("x", x), ("weight", weight))}


def errors(name: str, run: Callable[..., Tensor], dtype: torch.dtype) -> list[float]:
    """Of the output and the gradients, against one row after the other in float64."""
    return errors_of(run, reference.weighted_swiglu, make(name, dtype))


def fused(name: str) -> list[float]:
    """With several blocks in a row."""
    from linear_moe.kernels.triton import swiglu

    with mock.patch.object(swiglu, "_block", lambda width: 32):
        return errors(name, swiglu.weighted_swiglu, torch.float32)

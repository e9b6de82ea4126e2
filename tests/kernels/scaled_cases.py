"""Cases of heads times a number each; run_interpreted.py runs the fused kernel in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
from scan_cases import errors_of
from torch import Tensor

from linear_moe.kernels import reference

CASES = {
    "one tile": (1, 3, 2, 16),
    "several tiles": (2, 37, 3, 20),
    "wide": (1, 5, 2, 200),
    "slice": (2, 9, 3, 8),
}
"""B, T, H and V; of ``slice``, x is part of a wider tensor, time first."""


def make(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    batch, tokens, heads, width = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    x = torch.randn(tokens, batch, heads, width + 3, generator=generator, dtype=torch.float64).to(dtype)
    x = x.transpose(0, 1)[..., 2 : 2 + width]
    weight = torch.randn(batch, tokens, heads, generator=generator, dtype=torch.float64).to(dtype)
    x = x if name == "slice" else x.contiguous()
    return {n: t.detach().requires_grad_() for n, t in (("x", x), ("weight", weight))}


def errors(name: str, run: Callable[..., Tensor], dtype: torch.dtype) -> list[float]:
    """Of the output and the gradients, against one head after the other in float64."""
    return errors_of(run, reference.scale_heads, make(name, dtype))


def fused(name: str) -> list[float]:
    """With several tiles."""
    from linear_moe.kernels.triton import scaled

    with mock.patch.object(scaled, "ELEMENTS", 128):
        return errors(name, scaled.scale_heads, torch.float32)

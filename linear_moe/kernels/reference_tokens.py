"""Definitions of the kernels in ``tokens``, as those in ``reference``: one token after the other.

Letters: as in ``tokens``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    combine: Callable[[tuple[Tensor, Tensor, Tensor]], tuple[Tensor, Tensor, Tensor]] | None = None,
) -> Tensor:
    """PyTorch's cross entropy, one token at a time, and what autograd says of it; whole vocabulary only."""
    assert combine is None, "the definition has no slices"
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = []
    for row, label, factor in zip(logits, labels, weight, strict=True):
        with torch.enable_grad():
            x = row.detach().to(dtype).requires_grad_()
            loss = F.cross_entropy(x, label)
            (gradient,) = torch.autograd.grad(loss * factor, x)
        row.copy_(gradient)
        losses.append(loss.detach())
    return torch.stack(losses)


def spread_rows(x: Tensor, order: Tensor, place: Tensor) -> Tensor:
    """One slot after the other."""
    return torch.stack([x[slot // place.shape[1]] for slot in order.tolist()])


def collect_rows(x: Tensor, order: Tensor, place: Tensor, weight: Tensor | None = None) -> Tensor:
    """One token after the other."""
    weights = torch.ones_like(place, dtype=x.dtype) if weight is None else weight.to(x.dtype)
    return torch.stack(
        [sum(w * x[p] for w, p in zip(ws, ps)) for ws, ps in zip(weights, place.tolist())]  # type: ignore[misc]
    )


def weighted_swiglu(x: Tensor, weight: Tensor) -> Tensor:
    """One row after the other."""
    dtype, width = torch.promote_types(x.dtype, torch.float32), x.shape[1] // 2
    units = [
        w.to(dtype) * F.silu(row[:width].to(dtype)) * row[width:].to(dtype)
        for row, w in zip(x, weight, strict=True)
    ]
    return torch.stack(units).to(x.dtype) if units else x[:, :width]

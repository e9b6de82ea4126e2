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


def choose_experts(
    x: Tensor,
    per_token: int,
    *,
    among_chosen: bool = False,
    factor: float = 1.0,
    is_token: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One token after the other."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    probs, chosen = [], torch.zeros_like(x, dtype=torch.bool)
    score_sum, counts = x.new_zeros(x.shape[1], dtype=dtype), x.new_zeros(x.shape[1], dtype=dtype)
    for t, row in enumerate(x.to(dtype)):
        best = sorted(range(len(row)), key=lambda e: -row[e].item())[:per_token]
        chosen[t, best] = True
        scores = row.exp() / row.exp().sum()
        given = row[best].exp() / row[best].exp().sum() if among_chosen else scores[best]
        probs.append(torch.zeros_like(row).index_put((torch.tensor(best),), factor * given))
        if is_token is None or is_token[t]:
            score_sum = score_sum + scores
            counts = counts + chosen[t]
    return torch.stack(probs).to(x.dtype), chosen, score_sum, counts


def sort_slots(chosen: Tensor, probs: Tensor, per_token: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Expert after expert, and of each one token after the other."""
    num_tokens, num_experts = chosen.shape
    experts = []
    for row in chosen.tolist():
        first = [e for e in range(num_experts) if row[e]][:per_token]
        others = [e for e in range(num_experts) if not row[e]]
        experts.append(sorted(first + others[: per_token - len(first)]))
    slots = [
        (t, j, e)
        for e in range(num_experts)
        for t in range(num_tokens)
        for j in range(per_token)
        if experts[t][j] == e
    ]
    order = torch.tensor([t * per_token + j for t, j, _ in slots])
    place = torch.empty(num_tokens, per_token, dtype=torch.int64)
    for i, (t, j, _) in enumerate(slots):
        place[t, j] = i
    counts = torch.tensor([sum(e == expert for _, _, e in slots) for expert in range(num_experts)])
    return order, place, counts, torch.stack([probs[t, e] for t, _, e in slots])


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

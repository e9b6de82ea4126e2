"""From a router's logits to slots sorted by expert, in torch; fused in ``triton/routes.py``.

    s_te   = softmax over e of x_te
    chosen = the k largest x_te of each token
    p_te   = factor s_te, or factor times the softmax over the chosen ones, where chosen; else 0

Letters: N tokens, E experts, k experts of a token, M = N * k slots.
"""

from __future__ import annotations

import torch
from torch import Tensor


def choose_experts(
    x: Tensor,
    per_token: int,
    *,
    among_chosen: bool = False,
    factor: float = 1.0,
    is_token: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`linear_moe.kernels.choose_experts`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scores = wide.softmax(1)
    choice = x.detach().topk(per_token, dim=1).indices
    chosen = torch.zeros_like(x, dtype=torch.bool).scatter_(1, choice, True)
    probs = wide.masked_fill(~chosen, float("-inf")).softmax(1) if among_chosen else scores * chosen
    counted = chosen if is_token is None else chosen & is_token[:, None]
    scores = scores if is_token is None else scores * is_token[:, None]
    return (probs * factor).to(x.dtype), chosen, scores.sum(0), counted.to(scores.dtype).sum(0)


def sort_slots(chosen: Tensor, probs: Tensor, per_token: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`linear_moe.kernels.sort_slots`."""
    num_tokens, num_experts = chosen.shape
    choice = experts_of(chosen, per_token)
    order = stable_order(choice.flatten(), num_experts - 1)
    slots = torch.arange(order.numel(), device=order.device)
    place = torch.empty_like(order).scatter_(0, order, slots).view(num_tokens, per_token)
    experts = torch.arange(num_experts + 1, device=order.device)
    counts = torch.searchsorted(choice.flatten()[order], experts).diff()
    return order, place, counts, probs.gather(1, choice).flatten()[order]


def stable_order(keys: Tensor, largest: int) -> Tensor:
    """Positions int64 that sort integers from 0 to ``largest``; equal ones stay in order.

    A GPU sorts a byte in one pass, int64 in eight.
    """
    dtypes = torch.uint8, torch.int16, torch.int32
    dtype = next((dtype for dtype in dtypes if largest <= torch.iinfo(dtype).max), torch.int64)
    return torch.argsort(keys.to(dtype), stable=True)


def experts_of(chosen: Tensor, per_token: int) -> Tensor:
    """``[N, E]`` bool to the experts ``[N, k]`` int64 in rising order.

    A row with fewer than k, of a padded token, gets the first others, too; one with more, its first k.
    """
    num_experts = chosen.shape[1]
    missing = per_token - chosen.sum(1, keepdim=True)
    taken = chosen | ((~chosen).cumsum(1) <= missing)
    # A GPU reads a row once for every two bits of a key: of one byte, 4 times, of int64, 32 times.
    dtype = torch.int8 if num_experts <= 127 else torch.int16
    assert num_experts <= torch.iinfo(dtype).max
    key = num_experts - torch.arange(num_experts, dtype=dtype, device=chosen.device)
    return num_experts - torch.where(taken, key, 0).topk(per_token, dim=1).values.long()

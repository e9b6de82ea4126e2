"""Rows of tokens to the slots that a router sorted them into, and back: without atomics, in a fixed order.

    spread   y[place_tj] = x_t                          each of a token's k slots gets its row
    collect  x_t = sum_j weight_tj y[place_tj]          the sum of its slots

``place`` is a permutation of all slots, and ``order`` its inverse: ``order[place_tj] = t k + j``.

Letters: S tokens, k slots of a token, M = S * k slots, D any channels.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from linear_moe.kernels.once import once_differentiable


def spread_rows(x: Tensor, order: Tensor, place: Tensor) -> Tensor:
    """See :func:`linear_moe.kernels.spread_rows`."""
    return cast(Tensor, _Spread.apply(x, order, place))


def collect_rows(x: Tensor, order: Tensor, place: Tensor, weight: Tensor | None = None) -> Tensor:
    """See :func:`linear_moe.kernels.collect_rows`."""
    return cast(Tensor, _Collect.apply(x, order, place, weight))


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, order // place.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return _slots(grads[0], place).sum(1), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weight is not None else None, order, place, weight)
        slots = _slots(x, place)
        return slots.sum(1) if weight is None else (slots * _like(weight, slots)).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        x, order, place, weight = ctx.saved_tensors
        if weight is None:
            return grads[0].index_select(0, order // place.shape[1]), None, None, None
        slots = _slots(x, place)
        d_slots = grads[0].unsqueeze(1) * _like(weight, slots)
        d_weight = (grads[0].unsqueeze(1) * slots).unsqueeze(-1).flatten(2).sum(-1).to(weight.dtype)
        return d_slots.flatten(0, 1).index_select(0, order), None, None, d_weight


def _slots(x: Tensor, place: Tensor) -> Tensor:
    """``[M, ...]`` to ``[S, k, ...]``."""
    return x.index_select(0, place.flatten()).unflatten(0, place.shape)


def _like(weight: Tensor, slots: Tensor) -> Tensor:
    return weight.to(slots.dtype).view(*weight.shape, *(1,) * (slots.ndim - 2))

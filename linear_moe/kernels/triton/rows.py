# mypy: allow-untyped-defs
"""Fused moves of rows between tokens and slots (rows.py): a row is read or written once, sums are float32 and in order.

A program owns a token and a block of its channels.

Letters: S tokens, K slots of a token, M = S * K slots, D channels.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.once import once_differentiable
from linear_moe.kernels.triton.layout import rows_together
from linear_moe.kernels.triton.sizes import cdiv, next_power_of_2


def spread_rows(x: Tensor, order: Tensor, place: Tensor) -> Tensor:
    """See :func:`linear_moe.kernels.spread_rows`; any dtype."""
    return cast(Tensor, _Spread.apply(_flat(x), place.contiguous())).view(order.shape[0], *x.shape[1:])


def collect_rows(x: Tensor, order: Tensor, place: Tensor, weight: Tensor | None = None) -> Tensor:
    """See :func:`linear_moe.kernels.collect_rows`; float32, float16 and bfloat16."""
    return cast(Tensor, _Collect.apply(_flat(x), place.contiguous(), weight)).view(
        place.shape[0], *x.shape[1:]
    )


def _flat(x: Tensor) -> Tensor:
    """``[S, D]``; one number a row is one channel."""
    return x.flatten(1) if x.ndim > 1 else x.unsqueeze(1)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return _spread(x, place, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        return _collect(grads[0], place, None), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weight is not None else None, place, weight)
        return _collect(x, place, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor | None]:
        x, place, weight = ctx.saved_tensors
        d_weight = None
        if weight is not None and ctx.needs_input_grad[2]:
            d_weight = _products(grads[0], x, place).to(weight.dtype)
        return _spread(grads[0], place, weight), None, d_weight


def _spread(x: Tensor, place: Tensor, weight: Tensor | None) -> Tensor:
    return _move(rows_spread_kernel, place.numel(), x, place, weight)


def _collect(x: Tensor, place: Tensor, weight: Tensor | None) -> Tensor:
    return _move(rows_collect_kernel, place.shape[0], x, place, weight)


def _move(kernel: Any, num_rows: int, x: Tensor, place: Tensor, weight: Tensor | None) -> Tensor:
    y, rows = x.new_empty(num_rows, x.shape[1]), rows_together(x)
    grid = (place.shape[0], cdiv(x.shape[1], _block(x)))
    kernel[grid](
        rows, place, place if weight is None else weight.contiguous(), y, x.shape[1], rows.stride(0),
        K=place.shape[1], BLOCK=_block(x), HAS_WEIGHT=weight is not None, num_warps=4,
    )  # fmt: skip
    return y


def _products(a: Tensor, x: Tensor, place: Tensor) -> Tensor:
    """``[S, K]`` float32: each token's row of ``a`` times those of its slots."""
    y, a, x = a.new_empty(place.shape, dtype=torch.float32), rows_together(a), rows_together(x)
    rows_product_kernel[(place.shape[0],)](
        a, x, place, y, x.shape[1], a.stride(0), x.stride(0), K=place.shape[1], BLOCK=_block(x), num_warps=4
    )
    return y


def _block(x: Tensor) -> int:
    """Eight elements a thread are one 16-byte word in bfloat16; short rows take what they need."""
    return min(1024, max(16, next_power_of_2(x.shape[1])))


@triton.jit
def rows_spread_kernel(
    x, place, weight, y, num_channels, x_s, K: tl.constexpr, BLOCK: tl.constexpr, HAS_WEIGHT: tl.constexpr
):
    """y[place] = weight * x. Grid: (S, blocks)."""
    token = tl.program_id(0).to(tl.int64)
    i_D = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_D = i_D < num_channels
    b_x = tl.load(x + token * x_s + i_D, mask=m_D, other=0)
    for j in tl.static_range(K):
        slot = tl.load(place + token * K + j)
        b_y = b_x
        if HAS_WEIGHT:
            b_y = b_x.to(tl.float32) * tl.load(weight + token * K + j).to(tl.float32)
        tl.store(y + slot * num_channels + i_D, b_y.to(y.dtype.element_ty), mask=m_D)


@triton.jit
def rows_collect_kernel(
    x, place, weight, y, num_channels, x_s, K: tl.constexpr, BLOCK: tl.constexpr, HAS_WEIGHT: tl.constexpr
):
    """y = sum of weight * x[place]. Grid: (S, blocks)."""
    token = tl.program_id(0).to(tl.int64)
    i_D = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_D = i_D < num_channels
    b_y = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(K):
        slot = tl.load(place + token * K + j)
        b_x = tl.load(x + slot * x_s + i_D, mask=m_D, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            b_x *= tl.load(weight + token * K + j).to(tl.float32)
        b_y += b_x
    tl.store(y + token * num_channels + i_D, b_y.to(y.dtype.element_ty), mask=m_D)


@triton.jit
def rows_product_kernel(a, x, place, y, num_channels, a_s, x_s, K: tl.constexpr, BLOCK: tl.constexpr):
    """y[:, j] = a . x[place[:, j]]. Grid: (S,)."""
    token = tl.program_id(0).to(tl.int64)
    for j in tl.static_range(K):
        slot = tl.load(place + token * K + j)
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, num_channels, BLOCK):
            i_D = first + tl.arange(0, BLOCK)
            m_D = i_D < num_channels
            b_a = tl.load(a + token * a_s + i_D, mask=m_D, other=0.0).to(tl.float32)
            total += b_a * tl.load(x + slot * x_s + i_D, mask=m_D, other=0.0).to(tl.float32)
        tl.store(y + token * K + j, tl.sum(total, 0))

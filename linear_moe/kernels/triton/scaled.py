# mypy: allow-untyped-defs
"""Fused product of heads with a number each, float32 inside: dx = w dy, dw = sum_v dy x.

A program owns a tile of rows, heads of all tokens.

Letters: M rows, V width of a row.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.once import once_differentiable
from linear_moe.kernels.triton.sizes import cdiv, next_power_of_2

ELEMENTS = 4096
"""Of a tile, 32 for each thread of four warps."""


def scale_heads(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`linear_moe.kernels.scale_heads`; float32, float16 and bfloat16, V up to 256."""
    return cast(Tensor, _ScaleHeads.apply(x.contiguous(), weight.contiguous()))


class _ScaleHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = torch.empty_like(x)
        grid, constants = _plan(x)
        scaled_forward_kernel[grid](x, weight, y, weight.numel(), **constants)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dx, d_weight = torch.empty_like(x), torch.empty_like(weight)
        grid, constants = _plan(x)
        scaled_backward_kernel[grid](
            x, weight, grads[0].contiguous(), dx, d_weight, weight.numel(), **constants
        )
        return dx, d_weight


def _plan(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    width = x.shape[-1]
    block = next_power_of_2(width)
    rows = max(1, ELEMENTS // block)
    return (cdiv(x.numel() // width, rows),), dict(V=width, BLOCK=block, ROWS=rows, num_warps=4)


@triton.jit(do_not_specialize=["num_rows"])
def scaled_forward_kernel(x, weight, y, num_rows, V: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """y ``[M, V]``. Grid: (tiles of rows,)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i_V = tl.arange(0, BLOCK)
    m = (row < num_rows)[:, None] & (i_V < V)[None, :]
    at = row[:, None] * V + i_V[None, :]
    b_w = tl.load(weight + row, mask=row < num_rows, other=0.0).to(tl.float32)
    b_y = tl.load(x + at, mask=m, other=0.0).to(tl.float32) * b_w[:, None]
    tl.store(y + at, b_y.to(y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["num_rows"])
def scaled_backward_kernel(
    x, weight, dy, dx, d_weight, num_rows, V: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """dx ``[M, V]`` and d_weight ``[M]``. Grid: (tiles of rows,)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i_V = tl.arange(0, BLOCK)
    m_row = row < num_rows
    m = m_row[:, None] & (i_V < V)[None, :]
    at = row[:, None] * V + i_V[None, :]
    b_w = tl.load(weight + row, mask=m_row, other=0.0).to(tl.float32)
    b_x = tl.load(x + at, mask=m, other=0.0).to(tl.float32)
    b_dy = tl.load(dy + at, mask=m, other=0.0).to(tl.float32)
    tl.store(dx + at, (b_dy * b_w[:, None]).to(dx.dtype.element_ty), mask=m)
    tl.store(d_weight + row, tl.sum(b_dy * b_x, 1).to(d_weight.dtype.element_ty), mask=m_row)

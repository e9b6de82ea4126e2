# mypy: allow-untyped-defs
"""Fused weighted gated unit, forward and backward, float32 inside; nothing is stored but the inputs.

With s = sigmoid(g), y = w s g u has the gradients

    dg = dy w u s (1 + g (1 - s)),    du = dy w s g,    dw = sum_f dy s g u

A program owns one row, so that dw is a sum of its own.

Letters: M rows, F width of a unit.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.once import once_differentiable
from linear_moe.kernels.triton.layout import rows_together
from linear_moe.kernels.triton.sizes import next_power_of_2


def weighted_swiglu(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`linear_moe.kernels.weighted_swiglu`; float32, float16 and bfloat16."""
    return cast(Tensor, _WeightedSwiGLU.apply(rows_together(x), weight))


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        rows, width = x.shape[0], x.shape[1] // 2
        y = x.new_empty(rows, width)
        if rows:
            swiglu_forward_kernel[(rows,)](
                x, weight.contiguous(), y, width, x.stride(0), BLOCK=_block(width), num_warps=4
            )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dy = grads[0].contiguous()
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        width = dy.shape[1]
        if dy.shape[0]:
            swiglu_backward_kernel[(dy.shape[0],)](
                x, weight.contiguous(), dy, dx, d_weight, width, x.stride(0), BLOCK=_block(width), num_warps=4
            )
        return dx, d_weight


def _block(width: int) -> int:
    return min(1024, max(16, next_power_of_2(width)))


@triton.jit
def swiglu_forward_kernel(x, weight, y, width, x_m, BLOCK: tl.constexpr):
    """y ``[M, F]``. Grid: (M,)."""
    row = tl.program_id(0).to(tl.int64)
    w = tl.load(weight + row).to(tl.float32)
    for first in range(0, width, BLOCK):
        i_F = first + tl.arange(0, BLOCK)
        b_g = tl.load(x + row * x_m + i_F, mask=i_F < width, other=0.0).to(tl.float32)
        b_u = tl.load(x + row * x_m + width + i_F, mask=i_F < width, other=0.0).to(tl.float32)
        b_y = tl.sigmoid(b_g) * b_g * b_u * w
        tl.store(y + row * width + i_F, b_y.to(y.dtype.element_ty), mask=i_F < width)


@triton.jit
def swiglu_backward_kernel(x, weight, dy, dx, d_weight, width, x_m, BLOCK: tl.constexpr):
    """dx ``[M, 2F]`` and d_weight ``[M]``. Grid: (M,)."""
    row = tl.program_id(0).to(tl.int64)
    w = tl.load(weight + row).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        i_F = first + tl.arange(0, BLOCK)
        m_F = i_F < width
        b_g = tl.load(x + row * x_m + i_F, mask=m_F, other=0.0).to(tl.float32)
        b_u = tl.load(x + row * x_m + width + i_F, mask=m_F, other=0.0).to(tl.float32)
        b_dy = tl.load(dy + row * width + i_F, mask=m_F, other=0.0).to(tl.float32)
        b_s = tl.sigmoid(b_g)
        total += b_dy * b_s * b_g * b_u
        b_dy *= w
        b_dg = b_dy * b_u * b_s * (1 + b_g * (1 - b_s))
        tl.store(dx + row * 2 * width + i_F, b_dg.to(dx.dtype.element_ty), mask=m_F)
        tl.store(dx + row * 2 * width + width + i_F, (b_dy * b_s * b_g).to(dx.dtype.element_ty), mask=m_F)
    tl.store(d_weight + row, tl.sum(total, 0).to(d_weight.dtype.element_ty))

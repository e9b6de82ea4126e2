# mypy: allow-untyped-defs
"""Fused RMS norm with its weight and a gate: one read and one write, statistics never stored.

With r = 1 / sqrt(mean(x^2) + eps), n = x r, a = act(gate) and e = dy * scale * weight * a, the gradients are

    dx = r (e - n mean(e n)),   dgate = dy * scale * weight * n * act'(gate),   dweight = sum_t dy * scale * a * n

A program owns one head of a run of tokens. The sum over tokens is taken within runs, then over runs (and heads, where
they share the weight), always in the same order. Inputs are read where they lie, if their last dimension is contiguous.

Letters: B batch, T tokens, H heads, D width of a head, R runs of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.once import once_differentiable
from linear_moe.kernels.triton.layout import in_order_of, rows_together, runs_of_heads
from linear_moe.kernels.triton.sizes import next_power_of_2

TILE, RUN = 16, 128
"""Tokens that the four warps have at a time, and tokens of a program."""


def gated_rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    activation: str = "swish",
    eps: float = 1e-6,
    scale: float = 1.0,
) -> Tensor:
    """See :func:`linear_moe.kernels.gated_rms_norm`; float32, float16 and bfloat16, D up to 256."""
    return _GatedNorm.apply(
        rows_together(x), weight, None if gate is None else rows_together(gate), activation, eps, scale
    )


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        gate: Tensor | None,
        activation: str,
        eps: float,
        scale: float,
    ) -> Tensor:
        y = in_order_of(x if gate is None else gate, x)
        ctx.constants = _constants(x, weight, gate, activation)
        ctx.sizes = (x.shape[1], x.shape[2], eps, scale)
        g = x if gate is None else gate
        gated_norm_forward_kernel[runs_of_heads(x, RUN)](
            x, x if weight is None else weight.contiguous(), g, y,
            *ctx.sizes, *x.stride()[:3], *g.stride()[:3], *y.stride()[:2], **ctx.constants,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, gate)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, gate = ctx.saved_tensors
        dy, g = rows_together(dy), x if gate is None else gate
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dg = None if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
        runs, heads = runs_of_heads(x, RUN)
        parts = None if weight is None else x.new_empty(runs, heads, x.shape[-1], dtype=torch.float32)
        gated_norm_backward_kernel[runs, heads](
            x, x if weight is None else weight.contiguous(), g, dy, dx,
            dx if dg is None else dg, dx if parts is None else parts,
            *ctx.sizes, *x.stride()[:3], *g.stride()[:3], *dy.stride()[:3], **ctx.constants,
        )  # fmt: skip
        d_weight = None
        if parts is not None:
            d_weight = parts.sum((0, 1) if weight.ndim == 1 else 0).to(weight.dtype)
        return dx, d_weight, dg, None, None, None


def _constants(x: Tensor, weight: Tensor | None, gate: Tensor | None, activation: str) -> dict[str, Any]:
    width = x.shape[-1]
    block = max(16, next_power_of_2(width))
    return dict(
        D=width, BLOCK=block, TILE=max(4, TILE * 128 // block) if block > 128 else TILE, RUN=RUN,
        IS_SWISH=activation == "swish", HAS_WEIGHT=weight is not None, HAS_GATE=gate is not None,
        WEIGHT_PER_HEAD=weight is not None and weight.ndim == 2, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "num_heads", "eps", "scale"])
def gated_norm_forward_kernel(
    x, weight, gate, y, num_tokens, num_heads, eps, scale, x_b, x_t, x_h, g_b, g_t, g_h, y_b, y_t,
    D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr, IS_SWISH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_GATE: tl.constexpr, WEIGHT_PER_HEAD: tl.constexpr,
):  # fmt: skip
    """y ``[B, T, H, D]``, heads together. Grid: (B * R, H)."""
    runs = tl.cdiv(num_tokens, RUN)
    row, first, head = (
        (tl.program_id(0) // runs).to(tl.int64),
        tl.program_id(0) % runs * RUN,
        tl.program_id(1),
    )
    i_D = tl.arange(0, BLOCK)
    x += row * x_b + head.to(tl.int64) * x_h
    gate += row * g_b + head.to(tl.int64) * g_h
    w = tl.full([BLOCK], 1.0, tl.float32) * scale
    if HAS_WEIGHT:
        w *= tl.load(weight + i_D + (head * D if WEIGHT_PER_HEAD else 0), mask=i_D < D, other=0.0).to(
            tl.float32
        )
    for tile in range(tl.cdiv(tl.minimum(RUN, num_tokens - first), TILE)):
        token = (first + tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        m = (token < num_tokens)[:, None] & (i_D < D)[None, :]
        b_x = tl.load(x + token[:, None] * x_t + i_D[None, :], mask=m, other=0.0).to(tl.float32)
        b_y = b_x * tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)[:, None] * w[None, :]
        if HAS_GATE:
            b_g = tl.load(gate + token[:, None] * g_t + i_D[None, :], mask=m, other=0.0).to(tl.float32)
            b_y *= tl.sigmoid(b_g)
            if IS_SWISH:
                b_y *= b_g
        at = (row * y_b + token * y_t + head * D)[:, None] + i_D[None, :]
        tl.store(y + at, b_y.to(y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["num_tokens", "num_heads", "eps", "scale"])
def gated_norm_backward_kernel(
    x, weight, gate, dy, dx, d_gate, parts, num_tokens, num_heads, eps, scale,
    x_b, x_t, x_h, g_b, g_t, g_h, dy_b, dy_t, dy_h,
    D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr, IS_SWISH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_GATE: tl.constexpr, WEIGHT_PER_HEAD: tl.constexpr,
):  # fmt: skip
    """dx and d_gate ``[B, T, H, D]``, contiguous, and the gradient of the weight of each run, ``[B * R, H, D]``."""
    runs = tl.cdiv(num_tokens, RUN)
    row, first, head = (
        (tl.program_id(0) // runs).to(tl.int64),
        tl.program_id(0) % runs * RUN,
        tl.program_id(1),
    )
    i_D = tl.arange(0, BLOCK)
    x += row * x_b + head.to(tl.int64) * x_h
    gate += row * g_b + head.to(tl.int64) * g_h
    dy += row * dy_b + head.to(tl.int64) * dy_h
    w = tl.full([BLOCK], 1.0, tl.float32)
    if HAS_WEIGHT:
        w = tl.load(weight + i_D + (head * D if WEIGHT_PER_HEAD else 0), mask=i_D < D, other=0.0).to(
            tl.float32
        )
    d_weight = tl.zeros([TILE, BLOCK], tl.float32)
    for tile in range(tl.cdiv(tl.minimum(RUN, num_tokens - first), TILE)):
        token = (first + tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        m = (token < num_tokens)[:, None] & (i_D < D)[None, :]
        b_x = tl.load(x + token[:, None] * x_t + i_D[None, :], mask=m, other=0.0).to(tl.float32)
        b_dy = tl.load(dy + token[:, None] * dy_t + i_D[None, :], mask=m, other=0.0).to(tl.float32) * scale
        b_r = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)
        b_n = b_x * b_r[:, None]
        at = ((row * num_tokens + token) * num_heads + head)[:, None] * D + i_D[None, :]
        if HAS_GATE:
            b_g = tl.load(gate + token[:, None] * g_t + i_D[None, :], mask=m, other=0.0).to(tl.float32)
            b_s = tl.sigmoid(b_g)
            b_slope = b_s * (1 + b_g * (1 - b_s)) if IS_SWISH else b_s * (1 - b_s)
            b_dg = b_dy * b_n * w[None, :] * b_slope
            tl.store(d_gate + at, b_dg.to(d_gate.dtype.element_ty), mask=m)
            b_dy *= b_s * b_g if IS_SWISH else b_s
        d_weight += b_dy * b_n
        b_e = b_dy * w[None, :]
        b_dx = b_r[:, None] * (b_e - b_n * (tl.sum(b_e * b_n, 1) / D)[:, None])
        tl.store(dx + at, b_dx.to(dx.dtype.element_ty), mask=m)
    if HAS_WEIGHT:
        of_run = (tl.program_id(0).to(tl.int64) * num_heads + head) * D
        tl.store(parts + of_run + i_D, tl.sum(d_weight, 0), mask=i_D < D)

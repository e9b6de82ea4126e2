# mypy: allow-untyped-defs
"""Fused log decays from logits: one read of a logit, one write of a float32, and the same back.

With z = x + bias and y = -scale * rate * f(z), the gradients are

    dx = -scale * rate * f'(z) dy,   dbias = sum_t dx,   drate = sum_t,k -scale * f(z) dy

A program owns one head of a run of tokens. The sums over tokens are taken within runs, then over runs, always in the
same order. Inputs are read where they lie, if their last dimension is contiguous, and results lie as they do.

Letters: B batch, T tokens, H heads, K channels of a head, R runs of tokens.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.once import once_differentiable
from linear_moe.kernels.triton.layout import rows_together, runs_of_heads
from linear_moe.kernels.triton.sizes import next_power_of_2

TILE, RUN = 16, 128
"""Tokens that the four warps have at a time, if a head has 128 channels, and tokens of a program."""


def log_decay_of(
    x: Tensor,
    rate: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    form: str = "softplus",
    scale: float = 1.0,
) -> Tensor:
    """See :func:`linear_moe.kernels.log_decay_of`; float32, float16 and bfloat16, K up to 256."""
    return cast(Tensor, _LogDecay.apply(rows_together(x), rate, bias, form, scale))


class _LogDecay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rate: Tensor | None, bias: Tensor | None, form: str, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, rate, bias)
        ctx.sizes, ctx.constants = (*x.shape[1:3], scale), _constants(x, rate, bias, form)
        y = torch.empty_like(x, dtype=torch.float32)
        log_decay_forward_kernel[runs_of_heads(x, RUN)](
            *_tensors(x, rate, bias), y, *ctx.sizes, *x.stride()[:3], *y.stride()[:3], **ctx.constants
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, rate, bias = ctx.saved_tensors
        dy, dx = rows_together(grads[0]), torch.empty_like(x)
        runs, heads = runs_of_heads(x, RUN)
        summed = [t for t in (bias, rate) if t is not None]
        parts = x.new_empty(len(summed), runs, heads, x.shape[-1], dtype=torch.float32)
        log_decay_backward_kernel[runs, heads](
            *_tensors(x, rate, bias), dy, dx, parts if summed else dx, *ctx.sizes,
            *x.stride()[:3], *dy.stride()[:3], *dx.stride()[:3], **ctx.constants,
        )  # fmt: skip
        sums = iter(parts.sum(1))
        d_bias = None if bias is None else next(sums).to(bias.dtype)
        d_rate = None if rate is None else next(sums).sum(-1).to(rate.dtype)
        return dx, d_rate, d_bias, None, None


def _tensors(x: Tensor, rate: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
    return x, x if rate is None else rate.contiguous(), x if bias is None else bias.contiguous()


def _constants(x: Tensor, rate: Tensor | None, bias: Tensor | None, form: str) -> dict[str, Any]:
    return dict(blocks(x, TILE, RUN), FORM=form, HAS_RATE=rate is not None, HAS_BIAS=bias is not None)


def blocks(x: Tensor, tile: int, run: int) -> dict[str, int]:
    """Constants of kernels whose programs own ``run`` tokens, ``tile`` at a time if a head has 128 channels."""
    block = max(16, next_power_of_2(x.shape[-1]))
    return dict(D=x.shape[-1], BLOCK=block, TILE=max(4, tile * 128 // block), RUN=run, num_warps=4)


@triton.jit
def log_ratio(s):
    """log((1 + s) / (1 - s)) = 2 atanh(s), to about 1e-7 of itself for s from -1/3 to 1/3."""
    s2 = s * s
    series = 1.0 / 13 + s2 * (1.0 / 15)
    series = 1.0 / 7 + s2 * (1.0 / 9 + s2 * (1.0 / 11 + s2 * series))
    series = 1.0 + s2 * (1.0 / 3 + s2 * (1.0 / 5 + s2 * series))
    return 2.0 * s * series


@triton.jit
def _softplus(z):
    """log(1 + exp(z)), as exact where that is nearly nothing: exp(-abs(z)) is up to 1."""
    e = tl.exp(-tl.abs(z))
    return tl.maximum(z, 0.0) + log_ratio(e / (2.0 + e))


@triton.jit
def _value(z, FORM: tl.constexpr):
    """f(z)."""
    if FORM == "softplus":
        return _softplus(z)
    elif FORM == "log_sigmoid":
        return _softplus(-z)
    elif FORM == "sigmoid":
        return tl.sigmoid(z)
    else:
        return tl.exp(z)


@triton.jit
def _slope(z, FORM: tl.constexpr):
    """f'(z)."""
    if FORM == "softplus":
        return tl.sigmoid(z)
    elif FORM == "log_sigmoid":
        return -tl.sigmoid(-z)
    elif FORM == "sigmoid":
        return tl.sigmoid(z) * tl.sigmoid(-z)
    else:
        return tl.exp(z)


@triton.jit(do_not_specialize=["num_tokens", "num_heads", "scale"])
def log_decay_forward_kernel(
    x, rate, bias, y, num_tokens, num_heads, scale, x_b, x_t, x_h, y_b, y_t, y_h,
    D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr, FORM: tl.constexpr,
    HAS_RATE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """y ``[B, T, H, D]`` float32. Grid: (B * R, H)."""
    runs = tl.cdiv(num_tokens, RUN)
    row, first = (tl.program_id(0) // runs).to(tl.int64), tl.program_id(0) % runs * RUN
    head = tl.program_id(1).to(tl.int64)
    i_D = tl.arange(0, BLOCK)
    x += row * x_b + head * x_h
    y += row * y_b + head * y_h
    factor = -scale
    if HAS_RATE:
        factor *= tl.load(rate + head).to(tl.float32)
    for tile in range(tl.cdiv(tl.minimum(RUN, num_tokens - first), TILE)):
        token = (first + tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        m = (token < num_tokens)[:, None] & (i_D < D)[None, :]
        b_z = tl.load(x + token[:, None] * x_t + i_D[None, :], mask=m, other=0.0).to(tl.float32)
        if HAS_BIAS:
            b_z += tl.load(bias + head * D + i_D, mask=i_D < D, other=0.0).to(tl.float32)[None, :]
        tl.store(y + token[:, None] * y_t + i_D[None, :], _value(b_z, FORM) * factor, mask=m)


@triton.jit(do_not_specialize=["num_tokens", "num_heads", "scale"])
def log_decay_backward_kernel(
    x, rate, bias, dy, dx, parts, num_tokens, num_heads, scale,
    x_b, x_t, x_h, dy_b, dy_t, dy_h, dx_b, dx_t, dx_h,
    D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr, FORM: tl.constexpr,
    HAS_RATE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """dx ``[B, T, H, D]``, and of each run what is wanted of dbias and drate, ``parts`` ``[.., B * R, H, D]``."""
    runs = tl.cdiv(num_tokens, RUN)
    row, first = (tl.program_id(0) // runs).to(tl.int64), tl.program_id(0) % runs * RUN
    head = tl.program_id(1).to(tl.int64)
    i_D = tl.arange(0, BLOCK)
    x += row * x_b + head * x_h
    dy += row * dy_b + head * dy_h
    dx += row * dx_b + head * dx_h
    factor = -scale
    if HAS_RATE:
        factor *= tl.load(rate + head).to(tl.float32)
    d_bias, d_rate = tl.zeros([TILE, BLOCK], tl.float32), tl.zeros([TILE, BLOCK], tl.float32)
    for tile in range(tl.cdiv(tl.minimum(RUN, num_tokens - first), TILE)):
        token = (first + tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        m = (token < num_tokens)[:, None] & (i_D < D)[None, :]
        b_z = tl.load(x + token[:, None] * x_t + i_D[None, :], mask=m, other=0.0).to(tl.float32)
        if HAS_BIAS:
            b_z += tl.load(bias + head * D + i_D, mask=i_D < D, other=0.0).to(tl.float32)[None, :]
        b_dy = tl.load(dy + token[:, None] * dy_t + i_D[None, :], mask=m, other=0.0).to(tl.float32)
        b_dx = b_dy * _slope(b_z, FORM) * factor
        tl.store(dx + token[:, None] * dx_t + i_D[None, :], b_dx.to(dx.dtype.element_ty), mask=m)
        if HAS_BIAS:
            d_bias += b_dx
        if HAS_RATE:
            d_rate -= b_dy * _value(b_z, FORM) * scale
    of_run = (tl.program_id(0).to(tl.int64) * num_heads + head) * D + i_D
    if HAS_BIAS:
        tl.store(parts + of_run, tl.sum(d_bias, 0), mask=i_D < D)
    if HAS_RATE:
        if HAS_BIAS:
            of_run += tl.num_programs(0).to(tl.int64) * num_heads * D
        tl.store(parts + of_run, tl.sum(d_rate, 0), mask=i_D < D)

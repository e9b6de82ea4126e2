# mypy: allow-untyped-defs
"""Fused gates with a lower bound (bounded_decay.py): one read of a logit, both results written, and the same back.

With m the larger and n the smaller one of x and c, the odds of a are e^m q, q = 1 + e^(n - m) + e^n, and k = 1 - a:

    log a = log(1 - k)         where k < 1/2
          = m + log(q k)       elsewhere; m < 0, and q k is between 1/2 and 2
    dx    = dy sigmoid(-x) e^(x - m) / q - dk k sigmoid(x)
    dc    = sum_t (dy sigmoid(-c) e^(c - m) / q - dk k sigmoid(c))

x - m and c - m are 0 and n - m: nothing overflows but e^n, where both quotients are nothing; c may be -inf. One series
gives either logarithm, of 1 - k without its rounding.

A program owns one head of a run of tokens. The sum over tokens is taken within runs, then over runs, always in the same
order. Inputs are read where they lie, if their last dimension is contiguous, and results lie as the logits do.

Letters: B batch, T tokens, H heads, K channels of a head, R runs of tokens; x logit, c logit of the bound.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.once import once_differentiable
from linear_moe.kernels.triton.layout import rows_together, runs_of_heads
from linear_moe.kernels.triton.log_decay import blocks, log_ratio

TILE, RUN = 8, 128
"""Tokens that the four warps have at a time, eight channels a thread, if a head has 128, and tokens of a program."""


def bounded_decay_of(x: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`linear_moe.kernels.bounded_decay_of`; float32, float16 and bfloat16, K up to 256."""
    return cast(tuple[Tensor, Tensor], _BoundedDecay.apply(rows_together(x), bound))


class _BoundedDecay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, bound)
        k, y = torch.empty_like(x), torch.empty_like(x, dtype=torch.float32)
        bounded_decay_forward_kernel[runs_of_heads(x, RUN)](
            x, bound.contiguous(), k, y, *x.shape[1:3],
            *x.stride()[:3], *k.stride()[:3], *y.stride()[:3], **blocks(x, TILE, RUN),
        )  # fmt: skip
        return k, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, bound = ctx.saved_tensors
        dk, dy = map(rows_together, grads)
        dx, (runs, heads) = torch.empty_like(x), runs_of_heads(x, RUN)
        parts = x.new_empty(runs, heads, x.shape[-1], dtype=torch.float32)
        bounded_decay_backward_kernel[runs, heads](
            x, bound.contiguous(), dk, dy, dx, parts, *x.shape[1:3],
            *x.stride()[:3], *dk.stride()[:3], *dy.stride()[:3], *dx.stride()[:3], **blocks(x, TILE, RUN),
        )  # fmt: skip
        return dx, parts.sum(0).to(bound.dtype)


@triton.jit
def _sigmoids(z):
    """Of z and of -z, by one exponential."""
    b_less = tl.exp(-tl.abs(z))
    b_large = 1.0 / (1.0 + b_less)
    b_less *= b_large
    return tl.where(z < 0, b_less, b_large), tl.where(z < 0, b_large, b_less)


@triton.jit
def _odds(z, c):
    """e^(n - m), and q."""
    b_least = tl.exp(-tl.abs(z - c))
    return b_least, 1.0 + b_least + tl.exp(tl.minimum(z, c))


@triton.jit(do_not_specialize=["num_tokens", "num_heads"])
def bounded_decay_forward_kernel(
    x, bound, k, y, num_tokens, num_heads, x_b, x_t, x_h, k_b, k_t, k_h, y_b, y_t, y_h,
    D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """k ``[B, T, H, D]``, and y, log a, in float32. Grid: (B * R, H)."""
    runs = tl.cdiv(num_tokens, RUN)
    row, first = (tl.program_id(0) // runs).to(tl.int64), tl.program_id(0) % runs * RUN
    head = tl.program_id(1).to(tl.int64)
    i_D = tl.arange(0, BLOCK)
    x += row * x_b + head * x_h
    k += row * k_b + head * k_h
    y += row * y_b + head * y_h
    b_c = tl.load(bound + head * D + i_D, mask=i_D < D, other=0.0).to(tl.float32)[None, :]
    b_rest = tl.sigmoid(-b_c)
    for tile in range(tl.cdiv(tl.minimum(RUN, num_tokens - first), TILE)):
        token = (first + tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        m = (token < num_tokens)[:, None] & (i_D < D)[None, :]
        b_x = tl.load(x + token[:, None] * x_t + i_D[None, :], mask=m, other=0.0).to(tl.float32)
        b_k = b_rest * tl.sigmoid(-b_x)
        _, b_q = _odds(b_x, b_c)
        b_p, is_near = b_q * b_k, b_k < 0.5
        b_s = tl.where(is_near, -b_k, b_p - 1.0) / tl.where(is_near, 2.0 - b_k, b_p + 1.0)
        b_y = tl.where(is_near, 0.0, tl.maximum(b_x, b_c)) + log_ratio(b_s)
        tl.store(k + token[:, None] * k_t + i_D[None, :], b_k.to(k.dtype.element_ty), mask=m)
        tl.store(y + token[:, None] * y_t + i_D[None, :], b_y, mask=m)


@triton.jit(do_not_specialize=["num_tokens", "num_heads"])
def bounded_decay_backward_kernel(
    x, bound, dk, dy, dx, parts, num_tokens, num_heads,
    x_b, x_t, x_h, dk_b, dk_t, dk_h, dy_b, dy_t, dy_h, dx_b, dx_t, dx_h,
    D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """dx ``[B, T, H, D]``, and dc of each run, ``parts`` ``[B * R, H, D]``."""
    runs = tl.cdiv(num_tokens, RUN)
    row, first = (tl.program_id(0) // runs).to(tl.int64), tl.program_id(0) % runs * RUN
    head = tl.program_id(1).to(tl.int64)
    i_D = tl.arange(0, BLOCK)
    x += row * x_b + head * x_h
    dk += row * dk_b + head * dk_h
    dy += row * dy_b + head * dy_h
    dx += row * dx_b + head * dx_h
    b_c = tl.load(bound + head * D + i_D, mask=i_D < D, other=0.0).to(tl.float32)[None, :]
    b_bound, b_rest = _sigmoids(b_c)
    b_sum = tl.zeros([TILE, BLOCK], tl.float32)
    for tile in range(tl.cdiv(tl.minimum(RUN, num_tokens - first), TILE)):
        token = (first + tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        m = (token < num_tokens)[:, None] & (i_D < D)[None, :]
        b_x = tl.load(x + token[:, None] * x_t + i_D[None, :], mask=m, other=0.0).to(tl.float32)
        b_dk = tl.load(dk + token[:, None] * dk_t + i_D[None, :], mask=m, other=0.0).to(tl.float32)
        b_dy = tl.load(dy + token[:, None] * dy_t + i_D[None, :], mask=m, other=0.0)
        b_open, b_closed = _sigmoids(b_x)
        b_dk *= b_rest * b_closed
        b_least, b_q = _odds(b_x, b_c)
        b_dy /= b_q
        b_of_x, b_of_c = tl.where(b_x >= b_c, 1.0, b_least), tl.where(b_x >= b_c, b_least, 1.0)
        b_dx = b_dy * b_closed * b_of_x - b_dk * b_open
        tl.store(dx + token[:, None] * dx_t + i_D[None, :], b_dx.to(dx.dtype.element_ty), mask=m)
        b_sum += b_dy * b_rest * b_of_c - b_dk * b_bound
    of_run = (tl.program_id(0).to(tl.int64) * num_heads + head) * D + i_D
    tl.store(parts + of_run, tl.sum(b_sum, 0), mask=i_D < D)

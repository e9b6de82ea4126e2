# mypy: allow-untyped-defs
"""Fused keys of RWKV7 (edits.py): key and logit are read once, and k', a and b written; the same back.

With u = scale k, r = 1 / sqrt(sum u^2 + 1e-6), n = u r, s = sigmoid(x), c = 1 + (s - 1) strength and e = s db - da, the
gradients are

    du = r (e - n sum(e n)),   dk = scale du + c dk',   dx = s (1 - s) (n db + strength k dk')
    dscale = sum_t k du,       dstrength = sum_t (s - 1) k dk'

A program owns one head of a run of tokens. The sums over tokens are taken within runs, then over runs, always in the
same order. Inputs are read where they lie, if their last dimension is contiguous, and results lie as the keys do.

Letters: B batch, T tokens, H heads, K channels of a head, R runs of tokens; x logit.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.edits import EPS
from linear_moe.kernels.once import once_differentiable
from linear_moe.kernels.triton.layout import rows_together, runs_of_heads
from linear_moe.kernels.triton.log_decay import blocks

TILE, RUN = 8, 128
"""Tokens that the four warps have at a time, eight channels a thread, if a head has 128, and tokens of a program."""


def edit_keys(k: Tensor, logits: Tensor, scale: Tensor, strength: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`linear_moe.kernels.edit_keys`; float32, float16 and bfloat16, K up to 256."""
    found = _EditKeys.apply(rows_together(k), rows_together(logits), scale, strength)
    return cast(tuple[Tensor, Tensor, Tensor], found)


class _EditKeys(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, k: Tensor, logits: Tensor, scale: Tensor, strength: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(k, logits, scale, strength)
        written, removed, added = (torch.empty_like(k) for _ in range(3))
        edit_keys_forward_kernel[runs_of_heads(k, RUN)](
            k, logits, scale.contiguous(), strength.contiguous(), written, removed, added, *k.shape[1:3], EPS,
            *k.stride()[:3], *logits.stride()[:3], *written.stride()[:3], **blocks(k, TILE, RUN),
        )  # fmt: skip
        return written, removed, added

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        k, logits, scale, strength = ctx.saved_tensors
        d_written, d_removed, d_added = map(rows_together, grads)
        dk, dx = torch.empty_like(k), torch.empty_like(logits)
        runs, heads = runs_of_heads(k, RUN)
        parts = k.new_empty(2, runs, heads, k.shape[-1], dtype=torch.float32)
        edit_keys_backward_kernel[runs, heads](
            k, logits, scale.contiguous(), strength.contiguous(), d_written, d_removed, d_added, dk, dx, parts,
            *k.shape[1:3], EPS, *k.stride()[:3], *logits.stride()[:3], *d_written.stride()[:3],
            *d_removed.stride()[:3], *d_added.stride()[:3], *dk.stride()[:3], *dx.stride()[:3],
            **blocks(k, TILE, RUN),
        )  # fmt: skip
        d_scale, d_strength = parts.sum(1)
        return dk, dx, d_scale.to(scale.dtype), d_strength.to(strength.dtype)


@triton.jit(do_not_specialize=["num_tokens", "num_heads", "eps"])
def edit_keys_forward_kernel(
    k, logits, scale, strength, written, removed, added, num_tokens, num_heads, eps,
    k_b, k_t, k_h, x_b, x_t, x_h, y_b, y_t, y_h,
    D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """k', a and b, ``[B, T, H, D]`` with equal strides. Grid: (B * R, H)."""
    runs = tl.cdiv(num_tokens, RUN)
    row, first = (tl.program_id(0) // runs).to(tl.int64), tl.program_id(0) % runs * RUN
    head = tl.program_id(1).to(tl.int64)
    i_D = tl.arange(0, BLOCK)
    k += row * k_b + head * k_h
    logits += row * x_b + head * x_h
    b_scale = tl.load(scale + head * D + i_D, mask=i_D < D, other=0.0).to(tl.float32)[None, :]
    b_strength = tl.load(strength + head * D + i_D, mask=i_D < D, other=0.0).to(tl.float32)[None, :]
    for tile in range(tl.cdiv(tl.minimum(RUN, num_tokens - first), TILE)):
        token = (first + tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        m = (token < num_tokens)[:, None] & (i_D < D)[None, :]
        b_k = tl.load(k + token[:, None] * k_t + i_D[None, :], mask=m, other=0.0).to(tl.float32)
        b_x = tl.load(logits + token[:, None] * x_t + i_D[None, :], mask=m, other=0.0).to(tl.float32)
        b_s, b_n = tl.sigmoid(b_x), b_k * b_scale
        b_n *= tl.rsqrt(tl.sum(b_n * b_n, 1) + eps)[:, None]
        b_k *= 1 - tl.sigmoid(-b_x) * b_strength
        at = row * y_b + head * y_h + token[:, None] * y_t + i_D[None, :]
        tl.store(written + at, b_k.to(written.dtype.element_ty), mask=m)
        tl.store(removed + at, (-b_n).to(removed.dtype.element_ty), mask=m)
        tl.store(added + at, (b_n * b_s).to(added.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["num_tokens", "num_heads", "eps"])
def edit_keys_backward_kernel(
    k, logits, scale, strength, d_written, d_removed, d_added, dk, dx, parts, num_tokens, num_heads, eps,
    k_b, k_t, k_h, x_b, x_t, x_h, dw_b, dw_t, dw_h, da_b, da_t, da_h, db_b, db_t, db_h,
    dk_b, dk_t, dk_h, dx_b, dx_t, dx_h,
    D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """dk and dx ``[B, T, H, D]``, and dscale and dstrength of each run, ``parts`` ``[2, B * R, H, D]``."""
    runs = tl.cdiv(num_tokens, RUN)
    row, first = (tl.program_id(0) // runs).to(tl.int64), tl.program_id(0) % runs * RUN
    head = tl.program_id(1).to(tl.int64)
    i_D = tl.arange(0, BLOCK)
    k += row * k_b + head * k_h
    logits += row * x_b + head * x_h
    d_written += row * dw_b + head * dw_h
    d_removed += row * da_b + head * da_h
    d_added += row * db_b + head * db_h
    dk += row * dk_b + head * dk_h
    dx += row * dx_b + head * dx_h
    b_scale = tl.load(scale + head * D + i_D, mask=i_D < D, other=0.0).to(tl.float32)[None, :]
    b_strength = tl.load(strength + head * D + i_D, mask=i_D < D, other=0.0).to(tl.float32)[None, :]
    d_scale, d_strength = tl.zeros([TILE, BLOCK], tl.float32), tl.zeros([TILE, BLOCK], tl.float32)
    for tile in range(tl.cdiv(tl.minimum(RUN, num_tokens - first), TILE)):
        token = (first + tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        m = (token < num_tokens)[:, None] & (i_D < D)[None, :]
        b_k = tl.load(k + token[:, None] * k_t + i_D[None, :], mask=m, other=0.0).to(tl.float32)
        b_x = tl.load(logits + token[:, None] * x_t + i_D[None, :], mask=m, other=0.0).to(tl.float32)
        b_dw = tl.load(d_written + token[:, None] * dw_t + i_D[None, :], mask=m, other=0.0).to(tl.float32)
        b_e = tl.load(d_removed + token[:, None] * da_t + i_D[None, :], mask=m, other=0.0).to(tl.float32)
        b_db = tl.load(d_added + token[:, None] * db_t + i_D[None, :], mask=m, other=0.0).to(tl.float32)
        b_s, b_rest, b_n = tl.sigmoid(b_x), tl.sigmoid(-b_x), b_k * b_scale
        b_r = tl.rsqrt(tl.sum(b_n * b_n, 1) + eps)[:, None]
        b_n *= b_r
        b_e = b_s * b_db - b_e
        b_du = b_r * (b_e - b_n * tl.sum(b_e * b_n, 1)[:, None])
        b_dk = b_scale * b_du + (1 - b_rest * b_strength) * b_dw
        tl.store(dk + token[:, None] * dk_t + i_D[None, :], b_dk.to(dk.dtype.element_ty), mask=m)
        b_dw *= b_k
        b_dx = b_s * b_rest * (b_n * b_db + b_strength * b_dw)
        tl.store(dx + token[:, None] * dx_t + i_D[None, :], b_dx.to(dx.dtype.element_ty), mask=m)
        d_scale += b_k * b_du
        d_strength -= b_rest * b_dw
    of_run = (tl.program_id(0).to(tl.int64) * num_heads + head) * D + i_D
    tl.store(parts + of_run, tl.sum(d_scale, 0), mask=i_D < D)
    at = tl.num_programs(0).to(tl.int64) * num_heads * D + of_run
    tl.store(parts + at, tl.sum(d_strength, 0), mask=i_D < D)

# mypy: allow-untyped-defs
"""Fused rotary positions (rotary.py), forward and backward: queries and keys in one launch, each read and written once.

A program has the angles of a tile of tokens, makes their cosines and sines once, float32 inside, and turns a few heads
of queries or of keys. The backward pass is the same with the opposite sines. Inputs are read where they lie, if their
last dimension is contiguous.

Bytes: R angles of a token in float32 are 256 at R = 64, next to 8 KiB of 8 + 8 heads that are read and written. Tables
of cosines and sines would be twice that, and two more launches.

Letters: B batch, T tokens, H query heads, G key heads, K width of a head, R angles of a token.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.once import once_differentiable
from linear_moe.kernels.triton.layout import in_order_of, rows_together
from linear_moe.kernels.triton.sizes import cdiv, next_power_of_2

ELEMENTS = 1024
"""Pairs of a tile, eight for each thread of four warps: 16 bytes of each half in half precision."""

HEADS = 8
"""Of a program."""


def rotate_heads(q: Tensor, k: Tensor, angles: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """See :func:`linear_moe.kernels.rotate_heads`; float32, float16 and bfloat16."""
    return _Rotate.apply(q, k, rows_together(angles), scale)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, angles: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(angles)
        ctx.scale = scale
        return _rotate(q, k, angles, scale, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (angles,) = ctx.saved_tensors
        return *_rotate(grads[0], grads[1], angles, ctx.scale, -1.0), None, None


def _rotate(q: Tensor, k: Tensor, angles: Tensor, scale: float, sign: float) -> tuple[Tensor, Tensor]:
    q, k = rows_together(q), rows_together(k)
    q_new, k_new = in_order_of(q, q), in_order_of(k, k)
    batch, num_tokens, num_heads, width = q.shape
    num_angles, num_groups = angles.shape[-1], k.shape[2]
    block = max(16, next_power_of_2(num_angles))
    tile = max(1, ELEMENTS // block)
    blocks = cdiv(num_heads, HEADS) + cdiv(num_groups, HEADS)
    rotate_kernel[cdiv(num_tokens, tile), batch, blocks](
        q, k, angles, q_new, k_new, num_tokens, num_heads, num_groups, scale, sign,
        *q.stride()[:3], *k.stride()[:3], *angles.stride()[:2], *q_new.stride()[:3], *k_new.stride()[:3],
        K=width, R=num_angles, BLOCK=block, TILE=tile, HEADS=HEADS, num_warps=4,
    )  # fmt: skip
    return q_new, k_new


@triton.jit
def cos_and_sin(x):
    """Of an angle, to about 1e-7 however many turns it has: a quarter of a turn is left by float64.

    Triton's own are a call for each, with branches for each element.
    """
    quarters = x.to(tl.float64) * 0.6366197723675814  # 2 / pi
    nearest = tl.floor(quarters + 0.5)
    r = (quarters - nearest).to(tl.float32) * 1.5707963267948966
    z = r * r
    b_sin = r * (1 + z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880)))))
    b_cos = 1 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320))))
    quarter = nearest.to(tl.int64).to(tl.int32) & 3
    is_odd = (quarter & 1) == 1
    cos, sin = tl.where(is_odd, b_sin, b_cos), tl.where(is_odd, b_cos, b_sin)
    return tl.where((quarter == 1) | (quarter == 2), -cos, cos), tl.where(quarter >= 2, -sin, sin)


@triton.jit
def turn_heads(
    x, y, b_cos, b_sin, i_R, m_R, m_token, x_token, y_token, x_h, y_h, first, last,
    K: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The heads ``first`` to ``last`` of a tile of tokens, ``x_token`` and ``y_token`` where these are."""
    # Heads may lie outside of tokens, far apart; the few of a program fit 32 bits, in fewer registers.
    x += tl.cast(first, tl.int64) * x_h
    y += tl.cast(first, tl.int64) * y_h
    for head in range(0, last - first):
        p_x = x + (x_token + head * x_h)[:, None] + i_R[None, :]
        p_y = y + (y_token + head * y_h)[:, None] + i_R[None, :]
        b_1 = tl.load(p_x, mask=m_R, other=0.0).to(tl.float32)
        b_2 = tl.load(p_x + R, mask=m_R, other=0.0).to(tl.float32)
        tl.store(p_y, (b_1 * b_cos - b_2 * b_sin).to(y.dtype.element_ty), mask=m_R)
        tl.store(p_y + R, (b_2 * b_cos + b_1 * b_sin).to(y.dtype.element_ty), mask=m_R)
        for rest in tl.static_range(2 * R, K, BLOCK):
            m_K = m_token[:, None] & (rest + i_R < K)[None, :]
            tl.store(p_y + rest, tl.load(p_x + rest, mask=m_K, other=0.0), mask=m_K)


@triton.jit(do_not_specialize=["num_tokens", "num_heads", "num_groups", "scale", "sign"])
def rotate_kernel(
    q, k, angles, q_new, k_new, num_tokens, num_heads, num_groups, scale, sign,
    q_b, q_t, q_h, k_b, k_t, k_h, a_b, a_t, qn_b, qn_t, qn_h, kn_b, kn_t, kn_h,
    K: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """q_new ``[B, T, H, K]`` and k_new ``[B, T, G, K]``. Grid: (tiles of tokens, B, blocks of H + blocks of G)."""
    row = tl.program_id(1).to(tl.int64)
    token = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    i_R, m_token = tl.arange(0, BLOCK), token < num_tokens
    m_R = m_token[:, None] & (i_R < R)[None, :]
    p_a = angles + (row * a_b + token * a_t)[:, None] + i_R[None, :]
    b_cos, b_sin = cos_and_sin(tl.load(p_a, mask=m_R, other=0.0))
    b_cos *= scale
    b_sin *= scale * sign
    first, of_queries = tl.program_id(2) * HEADS, tl.cdiv(num_heads, HEADS) * HEADS
    if first < of_queries:
        turn_heads(
            q, q_new, b_cos, b_sin, i_R, m_R, m_token, row * q_b + token * q_t, row * qn_b + token * qn_t, q_h, qn_h,
            first, tl.minimum(first + HEADS, num_heads), K, R, BLOCK,
        )  # fmt: skip
    else:
        first -= of_queries
        turn_heads(
            k, k_new, b_cos, b_sin, i_R, m_R, m_token, row * k_b + token * k_t, row * kn_b + token * kn_t, k_h, kn_h,
            first, tl.minimum(first + HEADS, num_groups), K, R, BLOCK,
        )  # fmt: skip

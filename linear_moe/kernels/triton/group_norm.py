# mypy: allow-untyped-defs
"""Fused group norm, what a token reads of its own, and a gate (gated_norm.py): one read of each input, one write.

With r = 1 / sqrt(var(x) + eps), n = (x - mean(x)) r, c = sum_K q bonus k, z = n weight + bias + c v, a = act(gate) and
e = dy a, the gradients are

    f = e weight,   dx = r (f - mean(f) - n mean(f n)),   dweight = sum_t e n,   dbias = sum_t e,   dgate = dy z act'
    dc = sum_V e v,   dv = c e,   dq = dc bonus k,   dk = dc bonus q,   dbonus = sum_t dc q k

A program owns one head of a run of tokens. The sums over tokens are taken within runs, then over runs, always in the
same order. Inputs are read where they lie, if their last dimension is contiguous.

Letters: B batch, T tokens, H heads, K key channels of a head, V value channels, R runs of tokens.
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

TILE, RUN = 8, 128
"""Tokens that the four warps have at a time, eight channels a thread, if a head has 128, and tokens of a program."""


def gated_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor | None = None,
    q: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    bonus: Tensor | None = None,
    *,
    activation: str | None = "swish",
    eps: float = 1e-5,
) -> Tensor:
    """See :func:`linear_moe.kernels.gated_group_norm`; float32, float16 and bfloat16, K and V up to 256."""
    gate, q, k, v = (None if t is None else rows_together(t) for t in (gate, q, k, v))
    return _GroupNorm.apply(rows_together(x), weight, bias, gate, q, k, v, bonus, activation, eps)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        gate: Tensor | None,
        q: Tensor | None,
        k: Tensor | None,
        v: Tensor | None,
        bonus: Tensor | None,
        activation: str | None,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, gate, q, k, v, bonus)
        ctx.sizes, ctx.constants = (*x.shape[1:3], eps), _constants(x, gate, q, activation)
        y = in_order_of(x if gate is None else gate, x)
        given, strides = _given(x, weight, bias, gate, q, k, v, bonus)
        group_norm_forward_kernel[runs_of_heads(x, RUN)](
            *given, y, *ctx.sizes, *strides, *y.stride()[:3], **ctx.constants
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, bias, gate, q, k, v, bonus = ctx.saved_tensors
        dy = rows_together(dy)
        given, strides = _given(x, weight, bias, gate, q, k, v, bonus)
        runs, heads = runs_of_heads(x, RUN)
        grads = [
            None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
            for t in (x, gate, q, k, v)
        ]
        parts = x.new_empty(2, runs, heads, x.shape[-1], dtype=torch.float32)
        of_bonus = None if q is None else x.new_empty(runs, heads, q.shape[-1], dtype=torch.float32)
        group_norm_backward_kernel[runs, heads](
            *given, dy, *(x if t is None else t for t in (*grads, of_bonus)), parts, *ctx.sizes, *strides,
            *dy.stride()[:3], **ctx.constants,
        )  # fmt: skip
        d_weight, d_bias = parts.sum(1)
        dx, dg, dq, dk, dv = grads
        d_bonus = None if bonus is None or of_bonus is None else of_bonus.sum(0).to(bonus.dtype)
        return dx, d_weight.to(weight.dtype), d_bias.to(bias.dtype), dg, dq, dk, dv, d_bonus, None, None


def _given(
    x: Tensor, weight: Tensor, bias: Tensor, *others: Tensor | None
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Tensors, and the strides of those of tokens; x stands for what there is not."""
    gate, q, k, v, bonus = (x if t is None else t for t in others)
    strides = (stride for t in (x, gate, q, k, v) for stride in t.stride()[:3])
    return (x, weight.contiguous(), bias.contiguous(), gate, q, k, v, bonus.contiguous()), tuple(strides)


def _constants(x: Tensor, gate: Tensor | None, q: Tensor | None, activation: str | None) -> dict[str, Any]:
    keys = x.shape[-1] if q is None else q.shape[-1]
    blocks = [max(16, next_power_of_2(width)) for width in (keys, x.shape[-1])]
    return dict(
        K=keys, V=x.shape[-1], BK=blocks[0], BV=blocks[1], TILE=max(4, TILE * 128 // max(blocks)), RUN=RUN,
        HAS_GATE=gate is not None, HAS_OWN=q is not None, IS_SWISH=activation == "swish",
        IS_SIGMOID=activation == "sigmoid", num_warps=4,
    )  # fmt: skip


@triton.jit
def _load(x, token, x_t, i_D, m):
    return tl.load(x + token[:, None] * x_t + i_D[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit
def _normalized(b_x, m, eps, V: tl.constexpr):
    """n, and r."""
    b_n = tl.where(m, b_x - (tl.sum(b_x, 1) / V)[:, None], 0.0)
    b_r = tl.rsqrt(tl.sum(b_n * b_n, 1) / V + eps)[:, None]
    return b_n * b_r, b_r


@triton.jit(do_not_specialize=["num_tokens", "num_heads", "eps"])
def group_norm_forward_kernel(
    x, weight, bias, gate, q, k, v, bonus, y, num_tokens, num_heads, eps,
    x_b, x_t, x_h, g_b, g_t, g_h, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, y_b, y_t, y_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_OWN: tl.constexpr, IS_SWISH: tl.constexpr, IS_SIGMOID: tl.constexpr,
):  # fmt: skip
    """y ``[B, T, H, V]``. Grid: (B * R, H)."""
    runs = tl.cdiv(num_tokens, RUN)
    row, first = (tl.program_id(0) // runs).to(tl.int64), tl.program_id(0) % runs * RUN
    head = tl.program_id(1).to(tl.int64)
    i_K, i_V = tl.arange(0, BK), tl.arange(0, BV)
    x += row * x_b + head * x_h
    gate += row * g_b + head * g_h
    q += row * q_b + head * q_h
    k += row * k_b + head * k_h
    v += row * v_b + head * v_h
    b_w = tl.load(weight + head * V + i_V, mask=i_V < V, other=0.0).to(tl.float32)[None, :]
    b_bias = tl.load(bias + head * V + i_V, mask=i_V < V, other=0.0).to(tl.float32)[None, :]
    if HAS_OWN:
        b_bonus = tl.load(bonus + head * K + i_K, mask=i_K < K, other=0.0).to(tl.float32)[None, :]
    for tile in range(tl.cdiv(tl.minimum(RUN, num_tokens - first), TILE)):
        token = (first + tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        m = (token < num_tokens)[:, None] & (i_V < V)[None, :]
        b_n, _ = _normalized(_load(x, token, x_t, i_V, m), m, eps, V)
        b_y = b_n * b_w + b_bias
        if HAS_OWN:
            m_K = (token < num_tokens)[:, None] & (i_K < K)[None, :]
            b_c = tl.sum(_load(q, token, q_t, i_K, m_K) * b_bonus * _load(k, token, k_t, i_K, m_K), 1)
            b_y += b_c[:, None] * _load(v, token, v_t, i_V, m)
        if HAS_GATE:
            b_g = _load(gate, token, g_t, i_V, m)
            if IS_SWISH or IS_SIGMOID:
                b_y *= tl.sigmoid(b_g)
            if not IS_SIGMOID:
                b_y *= b_g
        at = row * y_b + head * y_h + token[:, None] * y_t + i_V[None, :]
        tl.store(y + at, b_y.to(y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["num_tokens", "num_heads", "eps"])
def group_norm_backward_kernel(
    x, weight, bias, gate, q, k, v, bonus, dy, dx, d_gate, dq, dk, dv, of_bonus, parts, num_tokens, num_heads, eps,
    x_b, x_t, x_h, g_b, g_t, g_h, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, dy_b, dy_t, dy_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_OWN: tl.constexpr, IS_SWISH: tl.constexpr, IS_SIGMOID: tl.constexpr,
):  # fmt: skip
    """Gradients of tokens, contiguous; of each run dweight and dbias, ``parts`` ``[2, B * R, H, V]``, and dbonus."""
    runs = tl.cdiv(num_tokens, RUN)
    row, first = (tl.program_id(0) // runs).to(tl.int64), tl.program_id(0) % runs * RUN
    head = tl.program_id(1).to(tl.int64)
    i_K, i_V = tl.arange(0, BK), tl.arange(0, BV)
    x += row * x_b + head * x_h
    gate += row * g_b + head * g_h
    q += row * q_b + head * q_h
    k += row * k_b + head * k_h
    v += row * v_b + head * v_h
    dy += row * dy_b + head * dy_h
    b_w = tl.load(weight + head * V + i_V, mask=i_V < V, other=0.0).to(tl.float32)[None, :]
    b_bias = tl.load(bias + head * V + i_V, mask=i_V < V, other=0.0).to(tl.float32)[None, :]
    if HAS_OWN:
        b_bonus = tl.load(bonus + head * K + i_K, mask=i_K < K, other=0.0).to(tl.float32)[None, :]
        d_bonus = tl.zeros([TILE, BK], tl.float32)
    d_weight, d_bias = tl.zeros([TILE, BV], tl.float32), tl.zeros([TILE, BV], tl.float32)
    for tile in range(tl.cdiv(tl.minimum(RUN, num_tokens - first), TILE)):
        token = (first + tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        m = (token < num_tokens)[:, None] & (i_V < V)[None, :]
        of_token = ((row * num_tokens + token) * num_heads + head)[:, None]
        b_e = _load(dy, token, dy_t, i_V, m)
        b_n, b_r = _normalized(_load(x, token, x_t, i_V, m), m, eps, V)
        if HAS_OWN:
            m_K = (token < num_tokens)[:, None] & (i_K < K)[None, :]
            b_q, b_k = _load(q, token, q_t, i_K, m_K), _load(k, token, k_t, i_K, m_K)
            b_v = _load(v, token, v_t, i_V, m)
            b_c = tl.sum(b_q * b_bonus * b_k, 1)[:, None]
        if HAS_GATE:
            b_z = b_n * b_w + b_bias
            if HAS_OWN:
                b_z += b_c * b_v
            b_g = _load(gate, token, g_t, i_V, m)
            b_a, b_slope = b_g, tl.full([TILE, BV], 1.0, tl.float32)
            if IS_SIGMOID:
                b_a = tl.sigmoid(b_g)
                b_slope = b_a * (1 - b_a)
            if IS_SWISH:
                b_s = tl.sigmoid(b_g)
                b_a, b_slope = b_g * b_s, b_s * (1 + b_g * (1 - b_s))
            b_dg = b_e * b_z * b_slope
            tl.store(d_gate + of_token * V + i_V[None, :], b_dg.to(d_gate.dtype.element_ty), mask=m)
            b_e *= b_a
        if HAS_OWN:
            tl.store(dv + of_token * V + i_V[None, :], (b_c * b_e).to(dv.dtype.element_ty), mask=m)
            b_dc = tl.sum(b_e * b_v, 1)[:, None]
            at = of_token * K + i_K[None, :]
            tl.store(dq + at, (b_dc * b_bonus * b_k).to(dq.dtype.element_ty), mask=m_K)
            tl.store(dk + at, (b_dc * b_bonus * b_q).to(dk.dtype.element_ty), mask=m_K)
            d_bonus += b_dc * b_q * b_k
        d_weight += b_e * b_n
        d_bias += b_e
        b_e *= b_w
        b_dx = b_r * (b_e - (tl.sum(b_e, 1) / V)[:, None] - b_n * (tl.sum(b_e * b_n, 1) / V)[:, None])
        tl.store(dx + of_token * V + i_V[None, :], b_dx.to(dx.dtype.element_ty), mask=m)
    of_run = tl.program_id(0).to(tl.int64) * num_heads + head
    tl.store(parts + of_run * V + i_V, tl.sum(d_weight, 0), mask=i_V < V)
    parts += tl.num_programs(0).to(tl.int64) * num_heads * V
    tl.store(parts + of_run * V + i_V, tl.sum(d_bias, 0), mask=i_V < V)
    if HAS_OWN:
        tl.store(of_bonus + of_run * K + i_K, tl.sum(d_bonus, 0), mask=i_K < K)

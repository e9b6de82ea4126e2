# mypy: allow-untyped-defs
"""Fused skip, gate and RMS norm over the heads of a group: one read of each input, one write.

With p = x + d s, a = act(gate), q = p a, r = 1 / sqrt(mean(q^2) + eps), n = q r and e = dy * w, the gradients are

    dq = r (e - n mean(e n)),   dx = dq a,   ds = d dx,   dgate = dq p act'(gate)
    dw = sum_t dy n,            dd = sum_t,v dx s

A program owns one group of a run of tokens, and has a whole token at a time; backward it reads one of more than
``WIDEST`` channels twice. The sums over tokens are taken within
runs, then over runs, always in the same order. Inputs are read where they lie, if their last dimension is contiguous.

Letters: B batch, T tokens, H heads, G groups of heads, V width of a head, W channels of a group, R runs of tokens.
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

RUN = 16
"""Tokens of a program."""
WIDEST = 4096
"""Channels whose gradients registers hold at once, beside what is summed over tokens."""


def skip_gate_norm(
    x: Tensor,
    skip: Tensor | None,
    skip_weight: Tensor | None,
    weight: Tensor,
    gate: Tensor | None = None,
    *,
    num_groups: int = 1,
    activation: str = "swish",
    eps: float = 1e-6,
) -> Tensor:
    """See :func:`linear_moe.kernels.skip_gate_norm`; float32, float16 and bfloat16, up to 8192 channels a group."""
    skip, gate = (None if t is None else rows_together(t) for t in (skip, gate))
    return _SkipGateNorm.apply(rows_together(x), skip, skip_weight, weight, gate, num_groups, activation, eps)


class _SkipGateNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        skip: Tensor | None,
        skip_weight: Tensor | None,
        weight: Tensor,
        gate: Tensor | None,
        num_groups: int,
        activation: str,
        eps: float,
    ) -> Tensor:
        y = in_order_of(x if gate is None else gate, x)
        ctx.grid = x.shape[0] * cdiv(x.shape[1], RUN), num_groups
        ctx.constants = _constants(x, num_groups, activation, skip is not None, gate is not None)
        ctx.eps = eps
        s, d, g = _given(x, skip, skip_weight, gate)
        skip_norm_forward_kernel[ctx.grid](
            x, s, d, weight.contiguous(), g, y, x.shape[1], eps,
            *x.stride()[:3], *s.stride()[:3], *g.stride()[:3], *y.stride()[:2], **ctx.constants,
        )  # fmt: skip
        ctx.save_for_backward(x, skip, skip_weight, weight, gate)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, skip, skip_weight, weight, gate = ctx.saved_tensors
        dy, (s, d, g) = rows_together(dy), _given(x, skip, skip_weight, gate)
        dx, d_skip, dg = (
            None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
            for t in (x, skip, gate)
        )
        parts = x.new_empty(1 if skip is None else 2, ctx.grid[0], *x.shape[2:], dtype=torch.float32)
        kernel, constants = skip_norm_backward_kernel, ctx.constants
        if constants["W"] > WIDEST:
            rest = max(16, next_power_of_2(constants["W"] - WIDEST))
            kernel, constants = skip_norm_wide_backward_kernel, constants | dict(BLOCK=WIDEST, REST=rest)
        kernel[ctx.grid](
            x, s, d, weight.contiguous(), g, dy, dx, dx if d_skip is None else d_skip, dx if dg is None else dg,
            parts, x.shape[1], ctx.eps,
            *x.stride()[:3], *s.stride()[:3], *g.stride()[:3], *dy.stride()[:3], **constants,
        )  # fmt: skip
        d_weight, *of_skip = parts.sum(1)
        d_skip_weight = None if skip_weight is None else of_skip[0].sum(-1).to(skip_weight.dtype)
        return dx, d_skip, d_skip_weight, d_weight.to(weight.dtype), dg, None, None, None


def _given(
    x: Tensor, skip: Tensor | None, skip_weight: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Skip, its weight and the gate; x stands for what there is not."""
    s, g = (x if t is None else t for t in (skip, gate))
    return s, x if skip_weight is None else skip_weight.contiguous(), g


def _constants(x: Tensor, num_groups: int, activation: str, has_skip: bool, has_gate: bool) -> dict[str, Any]:
    heads, width = x.shape[2], x.shape[3]
    block = max(16, next_power_of_2(heads // num_groups * width))
    return dict(
        H=heads, V=width, W=heads // num_groups * width, BLOCK=block, RUN=RUN, IS_SWISH=activation == "swish",
        HAS_SKIP=has_skip, HAS_GATE=has_gate, num_warps=min(16, max(4, block // 256)),
    )  # fmt: skip


@triton.jit
def _place(x, row, token, i_head, i_V, x_b, x_t, x_h):
    """Where the channels of a token are."""
    return x + row * x_b + token * x_t + i_head.to(tl.int64) * x_h + i_V


@triton.jit(do_not_specialize=["num_tokens", "eps"])
def skip_norm_forward_kernel(
    x, skip, skip_weight, weight, gate, y, num_tokens, eps,
    x_b, x_t, x_h, s_b, s_t, s_h, g_b, g_t, g_h, y_b, y_t,
    H: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
    IS_SWISH: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """y ``[B, T, H, V]``, heads together. Grid: (B * R, G)."""
    runs = tl.cdiv(num_tokens, RUN)
    row = (tl.program_id(0) // runs).to(tl.int64)
    first = tl.program_id(0) % runs * RUN
    i_W = tl.arange(0, BLOCK)
    m_W = i_W < W
    channel = tl.program_id(1) * W + i_W
    i_head, i_V = channel // V, channel % V
    b_w = tl.load(weight + channel, mask=m_W, other=0.0).to(tl.float32)
    if HAS_SKIP:
        b_d = tl.load(skip_weight + i_head, mask=m_W, other=0.0).to(tl.float32)
    for t in range(tl.minimum(RUN, num_tokens - first)):
        token = (first + t).to(tl.int64)
        b_y = tl.load(_place(x, row, token, i_head, i_V, x_b, x_t, x_h), mask=m_W, other=0.0).to(tl.float32)
        if HAS_SKIP:
            at_skip = _place(skip, row, token, i_head, i_V, s_b, s_t, s_h)
            b_s = tl.load(at_skip, mask=m_W, other=0.0).to(tl.float32)
            b_y += b_d * b_s
        if HAS_GATE:
            at_gate = _place(gate, row, token, i_head, i_V, g_b, g_t, g_h)
            b_g = tl.load(at_gate, mask=m_W, other=0.0).to(tl.float32)
            b_y *= tl.sigmoid(b_g)
            if IS_SWISH:
                b_y *= b_g
        b_y *= tl.rsqrt(tl.sum(b_y * b_y, 0) / W + eps) * b_w
        at = row * y_b + token * y_t
        tl.store(y + at + channel, b_y.to(y.dtype.element_ty), mask=m_W)


@triton.jit
def _of_channels(weight, skip_weight, channel, i_head, m_W, HAS_SKIP: tl.constexpr):
    """w and d."""
    b_w = tl.load(weight + channel, mask=m_W, other=0.0).to(tl.float32)
    b_d = b_w
    if HAS_SKIP:
        b_d = tl.load(skip_weight + i_head, mask=m_W, other=0.0).to(tl.float32)
    return b_w, b_d


@triton.jit
def _of_token(
    x, skip, gate, dy, row, token, i_head, i_V, m_W, b_d,
    x_b, x_t, x_h, s_b, s_t, s_h, g_b, g_t, g_h, dy_b, dy_t, dy_h,
    IS_SWISH: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_GATE: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """p, s, a, act'(gate) and dy.

    Of two loads that differ in ``CACHE``, the second is one: the compiler takes no registers for what the first found.
    """
    b_p = tl.load(
        _place(x, row, token, i_head, i_V, x_b, x_t, x_h), mask=m_W, other=0.0, cache_modifier=CACHE
    ).to(tl.float32)
    b_dy = tl.load(
        _place(dy, row, token, i_head, i_V, dy_b, dy_t, dy_h), mask=m_W, other=0.0, cache_modifier=CACHE
    ).to(tl.float32)
    b_s, b_a, b_slope = b_p, tl.full(i_V.shape, 1.0, tl.float32), tl.zeros(i_V.shape, tl.float32)
    if HAS_SKIP:
        at_skip = _place(skip, row, token, i_head, i_V, s_b, s_t, s_h)
        b_s = tl.load(at_skip, mask=m_W, other=0.0, cache_modifier=CACHE).to(tl.float32)
        b_p += b_d * b_s
    if HAS_GATE:
        at_gate = _place(gate, row, token, i_head, i_V, g_b, g_t, g_h)
        b_g = tl.load(at_gate, mask=m_W, other=0.0, cache_modifier=CACHE).to(tl.float32)
        b_open = tl.sigmoid(b_g)
        b_a = b_open * b_g if IS_SWISH else b_open
        b_slope = b_open * (1 + b_g * (1 - b_open)) if IS_SWISH else b_open * (1 - b_open)
    return b_p, b_s, b_a, b_slope, b_dy


@triton.jit
def _back(
    dx, d_skip, d_gate, at, m_W, b_p, b_s, b_a, b_slope, b_dy, b_w, b_d, r, mean,
    HAS_SKIP: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of a token; what it adds to dw and dd, for each channel."""
    b_n = b_p * b_a * r
    b_dq = r * (b_dy * b_w - b_n * mean)
    if HAS_GATE:
        tl.store(d_gate + at, (b_dq * b_p * b_slope).to(d_gate.dtype.element_ty), mask=m_W)
    b_dx = b_dq * b_a
    tl.store(dx + at, b_dx.to(dx.dtype.element_ty), mask=m_W)
    if HAS_SKIP:
        tl.store(d_skip + at, (b_dx * b_d).to(d_skip.dtype.element_ty), mask=m_W)
    return b_dy * b_n, b_dx * b_s


@triton.jit
def _store_parts(
    parts, channel, m_W, d_weight, d_skipped, H: tl.constexpr, V: tl.constexpr, HAS_SKIP: tl.constexpr
):
    """Of this run of tokens."""
    parts += tl.program_id(0).to(tl.int64) * (H * V)
    tl.store(parts + channel, d_weight, mask=m_W)
    if HAS_SKIP:
        tl.store(parts + tl.num_programs(0).to(tl.int64) * (H * V) + channel, d_skipped, mask=m_W)


@triton.jit(do_not_specialize=["num_tokens", "eps"])
def skip_norm_backward_kernel(
    x, skip, skip_weight, weight, gate, dy, dx, d_skip, d_gate, parts, num_tokens, eps,
    x_b, x_t, x_h, s_b, s_t, s_h, g_b, g_t, g_h, dy_b, dy_t, dy_h,
    H: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
    IS_SWISH: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """dx, d_skip and d_gate ``[B, T, H, V]``, contiguous; ``parts`` ``[2, B * R, H, V]``: dw, and dx s, of each run.

    Without a skip there is no d_skip, and only the first of ``parts``.
    """
    runs = tl.cdiv(num_tokens, RUN)
    row = (tl.program_id(0) // runs).to(tl.int64)
    first = tl.program_id(0) % runs * RUN
    i_W = tl.arange(0, BLOCK)
    m_W = i_W < W
    channel = tl.program_id(1) * W + i_W
    i_head, i_V = channel // V, channel % V
    b_w, b_d = _of_channels(weight, skip_weight, channel, i_head, m_W, HAS_SKIP)
    d_weight, d_skipped = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for t in range(tl.minimum(RUN, num_tokens - first)):
        token = (first + t).to(tl.int64)
        at = (row * num_tokens + token) * (H * V)
        b_p, b_s, b_a, b_slope, b_dy = _of_token(
            x, skip, gate, dy, row, token, i_head, i_V, m_W, b_d,
            x_b, x_t, x_h, s_b, s_t, s_h, g_b, g_t, g_h, dy_b, dy_t, dy_h, IS_SWISH, HAS_SKIP, HAS_GATE, "",
        )  # fmt: skip
        b_q = b_p * b_a
        r = tl.rsqrt(tl.sum(b_q * b_q, 0) / W + eps)
        mean = tl.sum(b_dy * b_w * (b_q * r), 0) / W
        of_weight, of_skip = _back(
            dx, d_skip, d_gate, at + channel, m_W, b_p, b_s, b_a, b_slope, b_dy, b_w, b_d, r, mean, HAS_SKIP, HAS_GATE
        )  # fmt: skip
        d_weight += of_weight
        d_skipped += of_skip
    _store_parts(parts, channel, m_W, d_weight, d_skipped, H, V, HAS_SKIP)


@triton.jit
def _sums_of_tile(
    x, skip, skip_weight, weight, gate, dy, row, token, channel, m_W,
    x_b, x_t, x_h, s_b, s_t, s_h, g_b, g_t, g_h, dy_b, dy_t, dy_h, V: tl.constexpr,
    IS_SWISH: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """Sums of q^2 and of e q."""
    i_head, i_V = channel // V, channel % V
    b_w, b_d = _of_channels(weight, skip_weight, channel, i_head, m_W, HAS_SKIP)
    b_p, _, b_a, _, b_dy = _of_token(
        x, skip, gate, dy, row, token, i_head, i_V, m_W, b_d,
        x_b, x_t, x_h, s_b, s_t, s_h, g_b, g_t, g_h, dy_b, dy_t, dy_h, IS_SWISH, HAS_SKIP, HAS_GATE, ".ca",
    )  # fmt: skip
    b_q = b_p * b_a
    return tl.sum(b_q * b_q, 0), tl.sum(b_dy * b_w * b_q, 0)


@triton.jit
def _tile_back(
    x, skip, skip_weight, weight, gate, dy, dx, d_skip, d_gate, row, token, at, channel, m_W, r, mean,
    x_b, x_t, x_h, s_b, s_t, s_h, g_b, g_t, g_h, dy_b, dy_t, dy_h, V: tl.constexpr,
    IS_SWISH: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """What ``_back`` says."""
    i_head, i_V = channel // V, channel % V
    b_w, b_d = _of_channels(weight, skip_weight, channel, i_head, m_W, HAS_SKIP)
    b_p, b_s, b_a, b_slope, b_dy = _of_token(
        x, skip, gate, dy, row, token, i_head, i_V, m_W, b_d,
        x_b, x_t, x_h, s_b, s_t, s_h, g_b, g_t, g_h, dy_b, dy_t, dy_h, IS_SWISH, HAS_SKIP, HAS_GATE, "",
    )  # fmt: skip
    return _back(
        dx, d_skip, d_gate, at + channel, m_W, b_p, b_s, b_a, b_slope, b_dy, b_w, b_d, r, mean, HAS_SKIP, HAS_GATE
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "eps"])
def skip_norm_wide_backward_kernel(
    x, skip, skip_weight, weight, gate, dy, dx, d_skip, d_gate, parts, num_tokens, eps,
    x_b, x_t, x_h, s_b, s_t, s_h, g_b, g_t, g_h, dy_b, dy_t, dy_h,
    H: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, RUN: tl.constexpr,
    IS_SWISH: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    """The same of more channels than registers hold: a token is read twice, in ``BLOCK`` channels and ``REST`` more.

    The second time it comes from the cache. What is summed over tokens stays in registers.
    """
    runs = tl.cdiv(num_tokens, RUN)
    row = (tl.program_id(0) // runs).to(tl.int64)
    first = tl.program_id(0) % runs * RUN
    group = tl.program_id(1) * W
    channel, other = group + tl.arange(0, BLOCK), group + BLOCK + tl.arange(0, REST)
    m_W, m_R = tl.arange(0, BLOCK) < W, BLOCK + tl.arange(0, REST) < W
    d_weight, d_skipped = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    d_weight_2, d_skipped_2 = tl.zeros([REST], tl.float32), tl.zeros([REST], tl.float32)
    for t in range(tl.minimum(RUN, num_tokens - first)):
        token = (first + t).to(tl.int64)
        at = (row * num_tokens + token) * (H * V)
        square, product = _sums_of_tile(
            x, skip, skip_weight, weight, gate, dy, row, token, channel, m_W,
            x_b, x_t, x_h, s_b, s_t, s_h, g_b, g_t, g_h, dy_b, dy_t, dy_h, V, IS_SWISH, HAS_SKIP, HAS_GATE,
        )  # fmt: skip
        square_2, product_2 = _sums_of_tile(
            x, skip, skip_weight, weight, gate, dy, row, token, other, m_R,
            x_b, x_t, x_h, s_b, s_t, s_h, g_b, g_t, g_h, dy_b, dy_t, dy_h, V, IS_SWISH, HAS_SKIP, HAS_GATE,
        )  # fmt: skip
        r = tl.rsqrt((square + square_2) / W + eps)
        mean = (product + product_2) * r / W
        of_weight, of_skip = _tile_back(
            x, skip, skip_weight, weight, gate, dy, dx, d_skip, d_gate, row, token, at, channel, m_W, r, mean,
            x_b, x_t, x_h, s_b, s_t, s_h, g_b, g_t, g_h, dy_b, dy_t, dy_h, V, IS_SWISH, HAS_SKIP, HAS_GATE,
        )  # fmt: skip
        d_weight += of_weight
        d_skipped += of_skip
        of_weight, of_skip = _tile_back(
            x, skip, skip_weight, weight, gate, dy, dx, d_skip, d_gate, row, token, at, other, m_R, r, mean,
            x_b, x_t, x_h, s_b, s_t, s_h, g_b, g_t, g_h, dy_b, dy_t, dy_h, V, IS_SWISH, HAS_SKIP, HAS_GATE,
        )  # fmt: skip
        d_weight_2 += of_weight
        d_skipped_2 += of_skip
    _store_parts(parts, channel, m_W, d_weight, d_skipped, H, V, HAS_SKIP)
    _store_parts(parts, other, m_R, d_weight_2, d_skipped_2, H, V, HAS_SKIP)

# mypy: allow-untyped-defs
"""Fused mixes of two tensors (lerp.py): both are read once for all mixes, and their gradients written once.

With z = weight_n + logits_n, m = act(z) and d = other - x, the gradients are

    dx = sum_n dy_n (1 - m_n),   dother = sum_n dy_n m_n,   dlogits_n = dy_n d act'(z),   dweight_n = sum_t dlogits_n

A program owns a block of channels of a run of tokens. The sums over tokens are taken within runs, then over runs,
always in the same order. Inputs are read where they lie, if their last dimension is contiguous; mixes lie as x does.

Letters: B batch, T tokens, N mixes, D channels, R runs of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.once import once_differentiable
from linear_moe.kernels.triton.layout import rows_together
from linear_moe.kernels.triton.sizes import cdiv

BLOCK, TILE, RUN = 128, 8, 128
"""Channels of a program, tokens that its four warps have at a time, eight channels a thread, and its tokens."""
MOST = 6
"""Mixes of one call."""


def lerp_tokens(
    x: Tensor,
    other: Tensor,
    weight: Tensor | None = None,
    logits: Tensor | None = None,
    *,
    activation: str | None = None,
) -> tuple[Tensor, ...]:
    """See :func:`linear_moe.kernels.lerp_tokens`; float32, float16 and bfloat16, up to six mixes."""
    x, other = rows_together(x), rows_together(other)
    logits = None if logits is None else rows_together(logits)
    found: tuple[Tensor, ...] = _Lerp.apply(x, other, weight, logits, activation == "sigmoid")
    return found


class _Lerp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, other: Tensor, weight: Tensor | None, logits: Tensor | None, is_sigmoid: bool
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, other, weight, logits)
        ctx.is_sigmoid = is_sigmoid
        num_mixes = len(weight) if weight is not None else 0 if logits is None else logits.shape[2]
        rows, num_tokens, width = x.shape
        if x.stride(0) < x.stride(1):
            y = x.new_empty(num_mixes, num_tokens, rows, width).transpose(1, 2)
        else:
            y = x.new_empty(num_mixes, rows, num_tokens, width)
        given, strides, constants = _given(x, other, weight, logits, is_sigmoid, num_mixes)
        lerp_forward_kernel[_grid(x)](*given, y, num_tokens, *strides, *y.stride()[:3], **constants)
        ctx.strides = y.stride()[1:]
        return y.unbind(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, other, weight, logits = ctx.saved_tensors
        given, strides, constants = _given(x, other, weight, logits, ctx.is_sigmoid, len(grads))
        dys = _alike(grads, ctx.strides)
        strides_of_dy = dys[0].stride()[:2]
        dys += dys[:1] * (MOST - len(dys))
        dx, d_other = torch.empty_like(x), torch.empty_like(other)
        d_logits = None if logits is None else torch.empty_like(logits)
        runs, blocks = _grid(x)
        parts = None if weight is None else x.new_empty(runs, *weight.shape, dtype=torch.float32)
        dl = dx.unsqueeze(2) if d_logits is None else d_logits
        lerp_backward_kernel[runs, blocks](
            *given, *dys, dx, d_other, dl, dx if parts is None else parts, x.shape[1], *strides,
            *strides_of_dy, *dx.stride()[:2], *d_other.stride()[:2], *dl.stride()[:3], **constants,
        )  # fmt: skip
        d_weight = None if parts is None or weight is None else parts.sum(0).to(weight.dtype)
        return dx, d_other, d_weight, d_logits, None


def _grid(x: Tensor) -> tuple[int, int]:
    return x.shape[0] * cdiv(x.shape[1], RUN), cdiv(x.shape[2], BLOCK)


def _given(
    x: Tensor, other: Tensor, weight: Tensor | None, logits: Tensor | None, is_sigmoid: bool, num_mixes: int
) -> tuple[tuple[Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """Tensors, their strides, and constants; x stands for what there is not."""
    z = x.unsqueeze(2) if logits is None else logits
    constants = dict(
        N=num_mixes, D=x.shape[2], BLOCK=BLOCK, TILE=TILE, RUN=RUN, num_warps=4,
        HAS_WEIGHT=weight is not None, HAS_LOGITS=logits is not None, IS_SIGMOID=is_sigmoid,
    )  # fmt: skip
    tensors = x, other, x if weight is None else weight.contiguous(), z
    return tensors, (*x.stride()[:2], *other.stride()[:2], *z.stride()[:3]), constants


def _alike(grads: tuple[Tensor, ...], strides: tuple[int, ...]) -> list[Tensor]:
    """Gradients of mixes with equal strides: as they come from the products that read mixes, or of the mixes."""
    found = [rows_together(dy) for dy in grads]
    if all(dy.stride() == found[0].stride() for dy in found):
        return found
    like = torch.empty_strided(grads[0].shape, strides, dtype=grads[0].dtype, device=grads[0].device)
    return [dy if dy.stride() == strides else torch.empty_like(like).copy_(dy) for dy in found]


@triton.jit
def _share(
    weight, logits, n, at, i_D, m, D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_LOGITS: tl.constexpr, IS_SIGMOID: tl.constexpr,
):  # fmt: skip
    """m_n, ``[TILE, BLOCK]`` float32."""
    b_m = tl.zeros(m.shape, tl.float32)
    if HAS_LOGITS:
        b_m = tl.load(logits + at, mask=m, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        b_m += tl.load(weight + n * D + i_D, mask=i_D < D, other=0.0).to(tl.float32)[None, :]
    return tl.sigmoid(b_m) if IS_SIGMOID else b_m


@triton.jit(do_not_specialize=["num_tokens"])
def lerp_forward_kernel(
    x, other, weight, logits, y, num_tokens, x_b, x_t, o_b, o_t, z_b, z_t, z_n, y_n, y_b, y_t,
    N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_LOGITS: tl.constexpr, IS_SIGMOID: tl.constexpr,
):  # fmt: skip
    """y ``[N, B, T, D]``. Grid: (B * R, blocks)."""
    runs = tl.cdiv(num_tokens, RUN)
    row, first = (tl.program_id(0) // runs).to(tl.int64), tl.program_id(0) % runs * RUN
    i_D = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for tile in range(tl.cdiv(tl.minimum(RUN, num_tokens - first), TILE)):
        token = (first + tile * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
        m = (token < num_tokens) & (i_D < D)[None, :]
        b_x = tl.load(x + row * x_b + token * x_t + i_D[None, :], mask=m, other=0.0).to(tl.float32)
        b_d = tl.load(other + row * o_b + token * o_t + i_D[None, :], mask=m, other=0.0).to(tl.float32) - b_x
        for n in tl.static_range(N):
            at = row * z_b + token * z_t + (row * 0 + n) * z_n + i_D[None, :]
            b_m = _share(weight, logits, n, at, i_D, m, D, HAS_WEIGHT, HAS_LOGITS, IS_SIGMOID)
            at = (row * 0 + n) * y_n + row * y_b + token * y_t + i_D[None, :]
            tl.store(y + at, (b_x + b_m * b_d).to(y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["num_tokens"])
def lerp_backward_kernel(
    x, other, weight, logits, dy_0, dy_1, dy_2, dy_3, dy_4, dy_5, dx, d_other, d_logits, parts, num_tokens,
    x_b, x_t, o_b, o_t, z_b, z_t, z_n, dy_b, dy_t, dx_b, dx_t, do_b, do_t, dz_b, dz_t, dz_n,
    N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, RUN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_LOGITS: tl.constexpr, IS_SIGMOID: tl.constexpr,
):  # fmt: skip
    """dx, d_other ``[B, T, D]`` and d_logits ``[B, T, N, D]``, and of each run dweight, ``parts`` ``[B * R, N, D]``."""
    runs = tl.cdiv(num_tokens, RUN)
    row, first = (tl.program_id(0) // runs).to(tl.int64), tl.program_id(0) % runs * RUN
    i_D = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d_0 = tl.zeros([TILE, BLOCK], tl.float32)
    d_1, d_2, d_3, d_4, d_5 = d_0, d_0, d_0, d_0, d_0
    for tile in range(tl.cdiv(tl.minimum(RUN, num_tokens - first), TILE)):
        token = (first + tile * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
        m = (token < num_tokens) & (i_D < D)[None, :]
        b_x = tl.load(x + row * x_b + token * x_t + i_D[None, :], mask=m, other=0.0).to(tl.float32)
        b_d = tl.load(other + row * o_b + token * o_t + i_D[None, :], mask=m, other=0.0).to(tl.float32) - b_x
        b_dx, b_do = tl.zeros([TILE, BLOCK], tl.float32), tl.zeros([TILE, BLOCK], tl.float32)
        for n in tl.static_range(N):
            at = row * z_b + token * z_t + (row * 0 + n) * z_n + i_D[None, :]
            b_m = _share(weight, logits, n, at, i_D, m, D, HAS_WEIGHT, HAS_LOGITS, IS_SIGMOID)
            at = row * dy_b + token * dy_t + i_D[None, :]
            if n == 0:
                b_dy = tl.load(dy_0 + at, mask=m, other=0.0).to(tl.float32)
            elif n == 1:
                b_dy = tl.load(dy_1 + at, mask=m, other=0.0).to(tl.float32)
            elif n == 2:
                b_dy = tl.load(dy_2 + at, mask=m, other=0.0).to(tl.float32)
            elif n == 3:
                b_dy = tl.load(dy_3 + at, mask=m, other=0.0).to(tl.float32)
            elif n == 4:
                b_dy = tl.load(dy_4 + at, mask=m, other=0.0).to(tl.float32)
            else:
                b_dy = tl.load(dy_5 + at, mask=m, other=0.0).to(tl.float32)
            b_do += b_dy * b_m
            b_dx += b_dy * (1 - b_m)
            b_dz = b_dy * b_d
            if IS_SIGMOID:
                b_dz *= b_m * (1 - b_m)
            if HAS_LOGITS:
                at = row * dz_b + token * dz_t + (row * 0 + n) * dz_n + i_D[None, :]
                tl.store(d_logits + at, b_dz.to(d_logits.dtype.element_ty), mask=m)
            if HAS_WEIGHT:
                if n == 0:
                    d_0 += b_dz
                elif n == 1:
                    d_1 += b_dz
                elif n == 2:
                    d_2 += b_dz
                elif n == 3:
                    d_3 += b_dz
                elif n == 4:
                    d_4 += b_dz
                else:
                    d_5 += b_dz
        at = row * dx_b + token * dx_t + i_D[None, :]
        tl.store(dx + at, b_dx.to(dx.dtype.element_ty), mask=m)
        at = row * do_b + token * do_t + i_D[None, :]
        tl.store(d_other + at, b_do.to(d_other.dtype.element_ty), mask=m)
    if HAS_WEIGHT:
        parts += tl.program_id(0).to(tl.int64) * (N * D) + i_D
        tl.store(parts, tl.sum(d_0, 0), mask=i_D < D)
        if N > 1:
            tl.store(parts + D, tl.sum(d_1, 0), mask=i_D < D)
        if N > 2:
            tl.store(parts + 2 * D, tl.sum(d_2, 0), mask=i_D < D)
        if N > 3:
            tl.store(parts + 3 * D, tl.sum(d_3, 0), mask=i_D < D)
        if N > 4:
            tl.store(parts + 4 * D, tl.sum(d_4, 0), mask=i_D < D)
        if N > 5:
            tl.store(parts + 5 * D, tl.sum(d_5, 0), mask=i_D < D)

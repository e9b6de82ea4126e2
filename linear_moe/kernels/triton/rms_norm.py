# mypy: allow-untyped-defs
"""Fused RMS norm of a residual stream: one read and one write; backward the stream's own gradient is added as well.

With r = 1 / sqrt(mean(x^2) + eps), n = x r and e = dy * weight, the gradients are

    dx = r (e - n mean(e n)) + dpassed,   dweight = sum_t dy n

where dpassed is the gradient of x as it was passed on. A fixed number of programs take tiles of tokens in turn, and
keep their sums over tokens for dweight, which are then added, always in the same order. Statistics are never stored.

Letters: M tokens of all rows, D hidden size, P programs.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.once import once_differentiable
from linear_moe.kernels.triton import configs
from linear_moe.kernels.triton.sizes import cdiv, next_power_of_2

PER_PROCESSOR = 4
"""Programs of the backward pass on each multiprocessor."""
ELEMENTS = 2048
"""Of a tile, if a token has no more: 16 for each thread of four warps."""


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """See :func:`linear_moe.kernels.rms_norm`; float32, float16 and bfloat16, D up to 8192."""
    return cast(tuple[Tensor, Tensor], _RMSNorm.apply(x, weight, eps))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        x_MD, y = _tokens(x), torch.empty_like(x, memory_format=torch.contiguous_format)
        constants = _constants(x_MD.shape[1])
        if num_tokens := x_MD.shape[0]:
            rms_norm_forward_kernel[(cdiv(num_tokens, constants["TILE"]),)](
                x_MD, weight.contiguous(), y, num_tokens, eps, x_MD.stride(0), **constants
            )
        return y, x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, d_passed: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return d_passed, None, None
        x, weight = ctx.saved_tensors
        x_MD, dy_MD = _tokens(x), _tokens(dy)
        passed_MD = x_MD if d_passed is None else _tokens(d_passed)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        constants = _constants(x_MD.shape[1])
        tiles = cdiv(len(x_MD), constants["TILE"])
        programs = min(tiles, PER_PROCESSOR * configs.num_processors(x.device))
        parts_PD = x.new_empty(programs, x_MD.shape[1], dtype=torch.float32)
        if programs:
            rms_norm_backward_kernel[(programs,)](
                x_MD, weight.contiguous(), dy_MD, passed_MD, dx, parts_PD, len(x_MD), ctx.eps,
                x_MD.stride(0), dy_MD.stride(0), passed_MD.stride(0), HAS_PASSED=d_passed is not None, **constants,
            )  # fmt: skip
        return dx, parts_PD.sum(0).to(weight.dtype), None


def _tokens(x: Tensor) -> Tensor:
    """``[M, D]``, copied only if no number is the stride of all tokens, or channels are apart."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _constants(width: int) -> dict[str, Any]:
    block = max(16, next_power_of_2(width))
    return dict(D=width, BLOCK=block, TILE=max(1, ELEMENTS // block), num_warps=max(4, block // 512))


@triton.jit
def _load(x, token, x_m, i_D, m):
    return tl.load(x + token[:, None] * x_m + i_D[None, :], mask=m, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens", "eps"])
def rms_norm_forward_kernel(
    x, weight, y, num_tokens, eps, x_m, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """y ``[M, D]``. Grid: tiles of tokens."""
    i_D = tl.arange(0, BLOCK)
    token = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    m = (token < num_tokens)[:, None] & (i_D < D)[None, :]
    b_w = tl.load(weight + i_D, mask=i_D < D, other=0.0).to(tl.float32)
    b_x = _load(x, token, x_m, i_D, m)
    b_r = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)
    b_y = b_x * b_r[:, None] * b_w[None, :]
    tl.store(y + token[:, None] * D + i_D[None, :], b_y.to(y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["num_tokens", "eps"])
def rms_norm_backward_kernel(
    x, weight, dy, passed, dx, parts, num_tokens, eps, x_m, dy_m, passed_m,
    D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, HAS_PASSED: tl.constexpr,
):  # fmt: skip
    """dx ``[M, D]``, and of each program its sum for dweight, ``[P, D]``. Grid: (P,)."""
    i_D = tl.arange(0, BLOCK)
    b_w = tl.load(weight + i_D, mask=i_D < D, other=0.0).to(tl.float32)
    d_weight = tl.zeros([TILE, BLOCK], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_tokens, TILE), tl.num_programs(0)):
        token = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        m = (token < num_tokens)[:, None] & (i_D < D)[None, :]
        b_x, b_dy = _load(x, token, x_m, i_D, m), _load(dy, token, dy_m, i_D, m)
        b_dx = tl.zeros([TILE, BLOCK], tl.float32)
        if HAS_PASSED:
            b_dx = _load(passed, token, passed_m, i_D, m)
        b_r = tl.rsqrt(tl.sum(b_x * b_x, 1) / D + eps)[:, None]
        b_e = b_dy * b_w[None, :]
        mean = tl.sum(b_e * b_x, 1)[:, None] * b_r / D
        b_n = tl.where(m, b_x * b_r, 0.0)  # without eps 0 * inf where there is no token
        d_weight += b_dy * b_n
        b_dx += b_r * (b_e - b_n * mean)
        tl.store(dx + token[:, None] * D + i_D[None, :], b_dx.to(dx.dtype.element_ty), mask=m)
    tl.store(parts + tl.program_id(0).to(tl.int64) * D + i_D, tl.sum(d_weight, 0), mask=i_D < D)

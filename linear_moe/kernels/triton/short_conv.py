"""Fused depthwise causal convolution of a few tokens: with its bias and activation one read and one write.

    p_t = bias + sum_j weight_j * x_{t - (W - 1) + j},    y_t = act(p_t)

With dp = dy * act'(p), and p computed again from the inputs, the gradients are

    dx_t = sum_m weight_{W - 1 - m} * dp_{t + m}    over the next tokens of the same document
    dweight_j = sum_t dp_t * x_{t - (W - 1) + j},   dbias = sum_t dp_t

The sums over tokens are taken by runs of ``RUN`` tokens and then over runs, always in the same order. Everything is
float32 inside; no input is copied whose last dimension is contiguous.

Letters: B batch, T tokens, G groups of channels, D channels of a group, W width, N documents, R runs of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from linear_moe.kernels.conv import last_inputs
from linear_moe.kernels.once import once_differentiable
from linear_moe.kernels.triton.layout import rows_together
from linear_moe.kernels.triton.short_conv_kernels import backward_kernel, forward_kernel, history_kernel

BLOCK, RUN = 64, 256
"""Channels and tokens of a program."""
TILE, TILE_BACKWARD = 16, 8
"""Tokens that its four warps have at a time. Forward, eight elements a thread are one 16-byte load (bfloat16) and 71
registers; backward, where some ten tiles are alive, four elements are 164 registers and eight are 243 (sm_90)."""


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`linear_moe.kernels.short_conv`; float32, float16 and bfloat16."""
    if state is not None:
        state = state.to(x.dtype)
    y = _ShortConv.apply(_grouped(x), weight, bias, state, cu_seqlens, activation == "silu")
    return y.view(x.shape), last_inputs(x, weight.shape[-1] - 1, state, cu_seqlens)


def _grouped(x: Tensor) -> Tensor:
    """``[B, T, G, D]`` with contiguous D."""
    return rows_together(x.unsqueeze(2) if x.ndim == 3 else x.flatten(2, -2))


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        is_silu: bool,
    ) -> Tensor:
        call = _Call.plan(x, weight, bias, state, cu_seqlens, is_silu)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        forward_kernel[call.grid](*call.tensors, y, *call.sizes, **call.constants)
        ctx.is_silu = is_silu
        document = None if cu_seqlens is None else call.tensors[-1]
        ctx.save_for_backward(x, weight, bias, state, cu_seqlens, document)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, bias, state, cu_seqlens, document = ctx.saved_tensors
        call = _Call.plan(x, weight, bias, state, cu_seqlens, ctx.is_silu, document)
        dy = rows_together(dy)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        parts = x.new_empty(call.num_runs, call.width + 1, call.channels, dtype=torch.float32)
        strides = dy.stride()[:3]
        constants = call.constants | {"TILE": TILE_BACKWARD}
        backward_kernel[call.grid](*call.tensors, dy, dx, parts, *call.sizes, *strides, **constants)
        sums = parts.sum(0)
        d_weight = sums[:-1].t().reshape(weight.shape).to(weight.dtype)
        d_bias = None if bias is None else sums[-1].reshape(bias.shape).to(bias.dtype)
        d_state = None
        if state is not None and ctx.needs_input_grad[3]:
            d_state = torch.empty_like(state, memory_format=torch.contiguous_format)
            grid = (call.num_documents, call.grid[1])
            history_kernel[grid](*call.tensors, dy, d_state, *call.sizes, *strides, **call.constants)
        return dx, d_weight, d_bias, d_state, None, None


@dataclass(frozen=True)
class _Call:
    """What the kernels of one call share."""

    tensors: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    constants: dict[str, Any]
    grid: tuple[int, int]
    num_runs: int
    num_documents: int
    channels: int
    width: int

    @classmethod
    def plan(
        cls,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        is_silu: bool,
        document: Tensor | None = None,
    ) -> _Call:
        rows, num_tokens, groups, group = x.shape
        width, num_runs = weight.shape[-1], triton.cdiv(num_tokens, RUN)
        cu = x if cu_seqlens is None else cu_seqlens.contiguous()
        num_documents = rows if cu_seqlens is None else cu.shape[0] - 1
        if document is None:
            document = x if cu_seqlens is None else _document_of(cu, num_tokens)
        constants: dict[str, Any] = dict(
            W=width, D=group, TILE=TILE, BLOCK=BLOCK, RUN=RUN, SILU=is_silu, num_warps=4,
            HAS_BIAS=bias is not None, HAS_STATE=state is not None, IS_PACKED=cu_seqlens is not None,
        )  # fmt: skip
        return cls(
            tensors=(
                x,
                weight.reshape(-1, width).contiguous(),
                x if bias is None else bias.reshape(-1).contiguous(),
                x if state is None else state.contiguous(),
                cu,
                document,
            ),
            sizes=(num_tokens, num_documents, groups, num_runs, *x.stride()[:3]),
            constants=constants,
            grid=(rows * num_runs, groups * triton.cdiv(group, BLOCK)),
            num_runs=rows * num_runs,
            num_documents=num_documents,
            channels=groups * group,
            width=width,
        )


def _document_of(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """``[T]`` int32, the document of each token; N after the last one."""
    token_T = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], token_T, right=True, out_int32=True)

"""Fused depthwise causal convolution of a few tokens: with its bias and activation one read and one write.

    p_t = bias + sum_j weight_j * x_{t - (W - 1) + j},    y_t = act(p_t)

With dp = dy * act'(p), and p computed again from the inputs, the gradients are

    dx_t = sum_m weight_{W - 1 - m} * dp_{t + m}    over the next tokens of the same document
    dweight_j = sum_t dp_t * x_{t - (W - 1) + j},   dbias = sum_t dp_t

The sums over tokens are taken by runs of ``RUN`` tokens and then over runs, always in the same order. Everything is
float32 inside; no input is copied whose last dimension is contiguous.

Letters: B batch, T tokens, G groups of channels, D channels of a group, C of them with a filter, W width, N documents,
R runs of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linear_moe.kernels.conv import cut, last_inputs
from linear_moe.kernels.once import once_differentiable
from linear_moe.kernels.triton.layout import rows_together
from linear_moe.kernels.triton.short_conv_kernels import (
    conv_backward_kernel,
    conv_forward_kernel,
    conv_history_kernel,
    conv_pass_kernel,
)
from linear_moe.kernels.triton.sizes import cdiv, next_power_of_2

BLOCK, WIDE = 128, 4
"""Channels of a program, and at most of one load: as many as a lane has."""
RUN, AHEAD = 128, 4
"""Tokens of a program, and those that it loads before it needs them."""
MOST_REGISTERS = 128
"""Of backward in half precision: 16 programs on a multiprocessor, where the assembler would take a few more. Of rows
of 32768 tokens and eight heads of 128 channels an H100 has all programs at once then. Packed rows would spill."""


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
    grouped = _grouped(x)
    (y,) = _ShortConv.apply(
        grouped, weight, bias, state, cu_seqlens, activation == "silu", (grouped.shape[-1],)
    )
    return y.view(x.shape), last_inputs(x, weight.shape[-1] - 1, state, cu_seqlens)


def conv_and_split(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    widths: tuple[int, ...],
    activation: str | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """See :func:`linear_moe.kernels.conv_and_split`; float32, float16 and bfloat16.

    The gradients of the parts go to their places in one tensor, those of convolved ones by the kernel itself.
    """
    if state is not None:
        state = state.to(x.dtype)
    parts = _ShortConv.apply(rows_together(x), weight, bias, state, cu_seqlens, activation == "silu", widths)
    return *parts, last_inputs(x[..., : weight.shape[1]], weight.shape[-1] - 1, state, cu_seqlens)


def _grouped(x: Tensor) -> Tensor:
    """``[B, T, G, D]`` with contiguous D."""
    return rows_together(x.unsqueeze(2) if x.ndim == 3 else x.flatten(2, -2))


class _ShortConv(torch.autograd.Function):
    """Parts of ``x``, ``widths`` channels of a group each: first those of the convolved channels, then the others."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        is_silu: bool,
        widths: tuple[int, ...],
    ) -> tuple[Tensor, ...]:
        call = _Call.plan(x, weight, bias, state, cu_seqlens, is_silu)
        y = x.new_empty(*x.shape[:3], call.group)
        tensors = x[..., : call.group], *call.tensors[1:]
        grid, walk = call.walk(call.group, x, y)
        conv_forward_kernel[grid](
            *tensors, y, *call.sizes, *_rows_and_tokens(x), X_G=_groups(x), D=call.group, **walk
        )
        ctx.is_silu, ctx.widths = is_silu, widths
        document = None if cu_seqlens is None else call.tensors[-1]
        ctx.save_for_backward(x, weight, bias, state, cu_seqlens, document)
        ctx.set_materialize_grads(False)
        return cut(y, x.detach()[..., call.group :], widths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, weight, bias, state, cu_seqlens, document = ctx.saved_tensors
        call = _Call.plan(x, weight, bias, state, cu_seqlens, ctx.is_silu, document)
        dx = torch.empty_like(x)
        sums = x.new_empty(call.num_runs, call.width + 1, call.channels, dtype=torch.float32)
        d_state = None
        if state is not None and ctx.needs_input_grad[3]:
            d_state = torch.empty_like(state, memory_format=torch.contiguous_format)
        first = 0
        for dy, width in zip(grads, ctx.widths, strict=True):
            x_here, dx_here = (t.narrow(-1, first, width) for t in (x, dx))
            if first >= call.group:
                dx_here.zero_() if dy is None else _pass_on(rows_together(dy), dx_here)
            else:
                dy = torch.zeros_like(x_here) if dy is None else dy
                call.back(x_here, rows_together(dy), dx_here, sums, d_state, first)
            first += width
        total = sums.sum(0)
        d_weight = total[:-1].t().reshape(weight.shape).to(weight.dtype)
        d_bias = None if bias is None else total[-1].reshape(bias.shape).to(bias.dtype)
        return dx, d_weight, d_bias, d_state, None, None, None


@dataclass(frozen=True)
class _Call:
    """What the kernels of one call share."""

    tensors: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    constants: dict[str, Any]
    num_groups: int
    num_runs: int
    num_documents: int
    group: int
    """Channels of a group that have filters, its first ones."""
    width: int

    @property
    def channels(self) -> int:
        """Of all groups."""
        return self.num_groups * self.group

    def walk(self, width: int, *tensors: Tensor) -> tuple[tuple[int], dict[str, Any]]:
        """Grid and constants of a kernel that goes through ``width`` channels of each group of ``tensors``."""
        wide = _aligned(width, *tensors)
        block = BLOCK // 2 if wide == 1 else BLOCK  # each load has an address
        constants = self.constants | dict(BLOCK=block, WIDE=wide, RUN=RUN, AHEAD=AHEAD, num_warps=1)
        return (self.num_runs * cdiv(self.num_groups * width, block),), constants

    def back(
        self, x: Tensor, dy: Tensor, dx: Tensor, sums: Tensor, d_state: Tensor | None, first: int
    ) -> None:
        """Write the gradients of the channels that ``x``, ``dy`` and ``dx`` have, from each group's ``first`` on."""
        width, tensors = dy.shape[-1], (x, *self.tensors[1:], dy)
        constants: dict[str, Any] = dict(X_G=_groups(x), DY_G=_groups(dy), D=width, C=self.group)
        sizes = *self.sizes, *_rows_and_tokens(x), *_rows_and_tokens(dy)
        grid, walk = self.walk(width, x, dy, dx)
        if x.element_size() == 2 and not walk["IS_PACKED"]:
            walk["maxnreg"] = MOST_REGISTERS
        conv_backward_kernel[grid](
            *tensors, dx, sums, *sizes, *_rows_and_tokens(dx), first, DX_G=_groups(dx), **constants, **walk
        )
        if d_state is not None:
            grid = (self.num_documents * cdiv(self.num_groups * width, BLOCK),)
            conv_history_kernel[grid](
                *tensors, d_state, *sizes, first, **constants, **self.constants, BLOCK=BLOCK, WIDE=1, num_warps=1
            )  # fmt: skip

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
        rows, num_tokens, groups, _ = x.shape
        width, num_runs = weight.shape[-1], cdiv(num_tokens, RUN)
        taps = weight.reshape(-1, width).contiguous()  # stands for what there is not, too
        cu = taps if cu_seqlens is None else cu_seqlens.contiguous()
        num_documents = rows if cu_seqlens is None else cu.shape[0] - 1
        if document is None:
            document = taps if cu_seqlens is None else _document_of(cu, num_tokens)
        constants: dict[str, Any] = dict(
            W=width, SILU=is_silu,
            HAS_BIAS=bias is not None, HAS_STATE=state is not None, IS_PACKED=cu_seqlens is not None,
        )  # fmt: skip
        return cls(
            tensors=(
                x,
                taps,
                taps if bias is None else bias.reshape(-1).contiguous(),
                taps if state is None else state.contiguous(),
                cu,
                document,
            ),
            sizes=(num_tokens, num_documents, groups, num_runs, 0),
            constants=constants,
            num_groups=groups,
            num_runs=rows * num_runs,
            num_documents=num_documents,
            group=weight.numel() // width // groups,
            width=width,
        )


def _pass_on(dy: Tensor, dx: Tensor) -> None:
    """``dx.copy_(dy)``: groups of a projection may be any number of bytes apart, of which torch copies two at a time.

    It looks for the place of each by several divisions, at a third of what the memory gives (H200: 5.2 ms of mamba2's
    step, 2.6 of gated_deltanet's).
    """
    rows, num_tokens, groups, width = dx.shape
    block = min(256, next_power_of_2(groups * width))
    constants = dict(
        DY_G=_groups(dy), DX_G=_groups(dx), D=width, ROWS=2048 // block, BLOCK=block, num_warps=4
    )
    conv_pass_kernel[(rows * cdiv(num_tokens, 2048 // block), cdiv(groups * width, block))](
        dy, dx, num_tokens, groups, *_rows_and_tokens(dy), *_rows_and_tokens(dx), **constants
    )


def _document_of(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """``[T]`` int32, the document of each token; N after the last one."""
    token_T = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], token_T, right=True, out_int32=True)


def _rows_and_tokens(x: Tensor) -> tuple[int, int]:
    """How far apart those of ``[B, T, G, D]`` are."""
    return (x.stride(0) if x.shape[0] > 1 else 0), x.stride(1)


def _groups(x: Tensor) -> int:
    """How far apart those of ``[B, T, G, D]`` are."""
    return x.stride(2) if x.shape[2] > 1 else 0


def _aligned(width: int, *tensors: Tensor) -> int:
    """How many of ``width`` channels, WIDE at most, Triton can load at once in every tensor.

    Of what is not compiled in it knows multiples of 16; groups of a projection may be as odd as 514 apart.
    """
    for x in tensors:
        if x.storage_offset() * x.element_size() % 16 or any(n % 16 for n in _rows_and_tokens(x)):
            return 1
    return math.gcd(WIDE, width, *map(_groups, tensors))

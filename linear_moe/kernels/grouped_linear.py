"""One matrix product per expert over tokens sorted by expert, in one kernel launch or in a loop.

    y[rows of e] = x[rows of e] @ weight[e]^T

``torch.nn.functional.grouped_mm`` has two gaps that matter here: an expert without tokens gets a weight gradient that
is not zero on Blackwell, where Hopper's is (github.com/pytorch/pytorch/issues/172439), and gradients must be dense.
Hence the autograd function.

A weight's gradient is summed over a micro-batch in float32 and leaves in the weight's dtype, as those of Megatron's own
layers do without Apex and Transformer Engine; Megatron adds it to a float32 buffer. ``grouped_mm`` of torch 2.11 gives
no other dtype and adds to no output (``out_dtype`` has to be that of its operands), and GEMMs that do, one for each
expert, want the tokens' numbers on the host. Where there is such a buffer, ``sums`` has a kernel of ours add to it.

Letters: M tokens, E experts, I and O sizes of the input and output.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from linear_moe.kernels.gradients import grouped_weight_grad_
from linear_moe.kernels.weight_grad import weight_grad

Sums = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, bool] | None]
"""Asked in a backward pass that will write a weight's gradient, with gradients of outputs ``[M, O]``, inputs and ends:
where it is summed, ``[E, O, I]``, and whether there is something to add it to. The gradient that autograd gets then has
any values. ``None``: autograd gets the gradient."""

ROWS = 16
"""Rows of a tile of a GEMM, or a multiple of that."""
FEW = 8
"""So many groups at most are all computed for every row in a CUDA graph that cannot group them."""


def can_group(x: Tensor, *weights: Tensor) -> bool:
    """Whether the grouped kernel takes these: bf16 on CUDA, rows of whole 16-byte words."""
    operands = (x, *weights)
    is_bf16 = all(t.is_cuda and t.dtype == torch.bfloat16 for t in operands)
    return is_bf16 and all(t.shape[-1] % 8 == 0 and t.data_ptr() % 16 == 0 for t in operands)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor, sums: Sums | None = None) -> Tensor:
    """Tokens times their experts' weights.

    Args:
        x: ``[M, I]``, sorted by expert.
        weight: ``[E, O, I]``; I and O multiples of 8 (bf16).
        ends: ``[E]`` int32 on the device of ``x``: where each expert's tokens end; the last is M.
        sums: where the gradient of ``weight`` goes, if not through autograd.

    Returns:
        ``[M, O]``.
    """
    return _GroupedLinear.apply(x, weight, ends, sums)


def looped_linear(x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """:func:`grouped_linear` for any device, dtype and size, one expert after the other.

    Without gradients, what a row gives does not depend on how many others its expert has: a GEMM of few rows, or of a
    number of them that does not fill its tiles, may add in another order, so the missing ones are added as zeros.
    """
    rows = x.split(counts)
    multiple = 1 if torch.is_grad_enabled() else ROWS
    outputs = []
    for x_e, weight_e, count in zip(rows, weight, counts, strict=True):
        x_e = F.pad(x_e, (0, 0, 0, -count % multiple)) if count % multiple else x_e
        outputs.append(F.linear(x_e, weight_e)[:count])
    return torch.cat(outputs)


def masked_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """:func:`grouped_linear` for any device, dtype and size: every row times all weights, of which its own is kept.

    As many times the work as there are experts, and nothing that a CUDA graph could not record. Rows are padded as in
    :func:`looped_linear`.
    """
    num_rows = x.shape[0]
    if not torch.is_grad_enabled():
        x = F.pad(x, (0, 0, 0, -num_rows % ROWS))
    row_M1 = torch.arange(len(x), device=x.device)[:, None]
    first, *others = weight.unbind()
    out = F.linear(x, first)
    for weight_e, start in zip(others, ends, strict=False):
        out = torch.where(row_M1 < start, out, F.linear(x, weight_e))
    return out[:num_rows]


def linear_by_group(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """:func:`grouped_linear` where it runs; else :func:`looped_linear`, which reads ``ends`` on the host, or, of few
    groups while a CUDA graph is captured, :func:`masked_linear`.
    """
    width = weight.shape[1]
    if x.is_cuda and width % 8:
        weight = F.pad(weight, (0, 0, 0, -width % 8))  # rows of whole words
    if can_group(x, weight):
        return grouped_linear(x, weight, ends)[:, :width]
    if x.is_cuda:
        _warn_of_loop_once(x.dtype, x.shape[1])
        if len(weight) <= FEW and torch.cuda.is_current_stream_capturing():
            return masked_linear(x, weight, ends)[:, :width]
    return looped_linear(x, weight, F.pad(ends, (1, 0)).diff().tolist())[:, :width]


@cache
def _warn_of_loop_once(dtype: torch.dtype, width: int) -> None:
    warnings.warn(
        f"experts, or the memories of a mixture, run one after the other, with a device sync per product (in a CUDA "
        f"graph up to {FEW} of them are all computed for every token): grouped GEMM needs bf16 and rows that are "
        f"multiples of 8, got {dtype} and {width}",
        stacklevel=3,
    )


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor, sums: Sums | None) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        ctx.sums = sums
        if x.shape[0] == 0:
            return x.new_empty(0, weight.shape[1])
        return F.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, ends = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = F.grouped_mm(grad, weight, offs=ends) if len(x) else torch.zeros_like(x)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_grad(grad, x.contiguous(), weight, ends, ctx.sums)
        return grad_x, grad_weight, None, None


def _weight_grad(dy: Tensor, x: Tensor, weight: Tensor, ends: Tensor, sums: Sums | None) -> Tensor:
    """What autograd gets."""
    place = None if sums is None else sums(dy, x, ends)
    if place is not None:
        grouped_weight_grad_(place[0], dy, x, ends, add=place[1])
        return torch.empty_like(weight)
    return weight_grad(dy, x, ends) if len(x) else torch.zeros_like(weight)

# mypy: allow-untyped-defs
"""Fused passes of the cross entropy over its logits: each reads a row once, the second writes it, float32 inside.

A program owns a row. Its running sum is rescaled whenever a block has a larger logit; nothing is atomic.

Letters: M tokens, V logits of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.cross_entropy import Statistics, with_passes

BLOCK = 4096
"""Logits at a time: 16 for each thread of 8 warps, two 16-byte loads in bfloat16."""


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    combine: Callable[[Statistics], Statistics] | None = None,
) -> Tensor:
    """See :func:`linear_moe.kernels.cross_entropy_`; float32, float16 and bfloat16."""
    return with_passes(_statistics, _gradient_, logits, labels, weight, combine)


def _statistics(logits: Tensor, labels: Tensor) -> Statistics:
    found = logits.new_empty(3, logits.shape[0], dtype=torch.float32)
    cross_entropy_read_kernel[(logits.shape[0],)](
        logits,
        labels.contiguous(),
        found,
        logits.shape[0],
        logits.shape[1],
        logits.stride(0),
        BLOCK=BLOCK,
        num_warps=8,
    )
    return found[0], found[1], found[2]


def _gradient_(logits: Tensor, labels: Tensor, log_sum: Tensor, weight: Tensor) -> None:
    cross_entropy_write_kernel[(logits.shape[0],)](
        logits, labels.contiguous(), log_sum.contiguous(), weight.contiguous(), logits.shape[1], logits.stride(0),
        BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    torch.autograd.graph.increment_version(logits)  # so that who has saved them for a backward pass is told


@triton.jit(do_not_specialize=["num_tokens"])
def cross_entropy_read_kernel(logits, labels, found, num_tokens, num_logits, stride, BLOCK: tl.constexpr):
    """``found`` ``[3, M]``: largest logit, sum of exponentials relative to it, logit of the label."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    largest, total = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
    for first in range(0, num_logits, BLOCK):
        i_V = first + tl.arange(0, BLOCK)
        b_x = tl.load(logits + i_V, mask=i_V < num_logits, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(b_x, 0))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # while all are -inf
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(b_x - base), 0)
        largest = larger
    label = tl.load(labels + row)
    is_here = (label >= 0) & (label < num_logits)
    picked = tl.load(logits + label, mask=is_here, other=0.0).to(tl.float32)
    tl.store(found + row, largest)
    tl.store(found + num_tokens + row, total)
    tl.store(found + 2 * num_tokens + row, picked)


@triton.jit
def cross_entropy_write_kernel(logits, labels, log_sum, weight, num_logits, stride, BLOCK: tl.constexpr):
    """Overwrite a row by its gradient."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label, factor, shift = tl.load(labels + row), tl.load(weight + row).to(tl.float32), tl.load(log_sum + row)
    for first in range(0, num_logits, BLOCK):
        i_V = first + tl.arange(0, BLOCK)
        b_x = tl.load(logits + i_V, mask=i_V < num_logits, other=float("-inf")).to(tl.float32)
        b_x = (tl.exp(b_x - shift) - tl.where(i_V == label, 1.0, 0.0)) * factor
        tl.store(logits + i_V, b_x.to(logits.dtype.element_ty), mask=i_V < num_logits)

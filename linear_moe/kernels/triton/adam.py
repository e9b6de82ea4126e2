# mypy: allow-untyped-defs
"""Fused step of Adam: a tensor, its gradient and its moments are read once and written once, with the copy in half
precision; the formulas are in :mod:`linear_moe.kernels.adam`.

30 bytes of traffic an element; clipping, torch's fused kernel and the copy take 42. What depends on the step alone is
computed on the host, in double precision. Square root and division are rounded as torch rounds them.

All blocks but the last are full and go without a mask: with one, loads of tensors whose length is no multiple of 16
would be single elements. Alignment of the tensors to 16 bytes is compiled in: Megatron's shards have it, and others are
another variant.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Elements of a program: 4 for each thread of 8 warps, 16 bytes of each float32 tensor and no exchange for ``half``."""


@torch.no_grad()
def adam_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    half: Tensor | None = None,
    *,
    step: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    factor: float = 1.0,
) -> None:
    """See :func:`linear_moe.kernels.adam_`; float32, ``half`` float16 or bfloat16, all of them contiguous."""
    num_elements, num_steps = param.numel(), step.item()
    if num_elements == 0:
        return
    adam_kernel[(triton.cdiv(num_elements, BLOCK),)](
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        half,
        num_elements,
        float(factor),
        float(weight_decay * lr if decoupled else weight_decay),
        float(beta1),
        float(1 - beta1),
        float(beta2),
        float(1 - beta2),
        float(lr / (1 - beta1**num_steps)),
        float(1 / math.sqrt(1 - beta2**num_steps)),
        float(eps),
        IS_DECOUPLED=decoupled,
        BLOCK=BLOCK,
        num_warps=8,
    )
    written = [x for x in (param, exp_avg, exp_avg_sq, half) if x is not None]
    torch.autograd.graph.increment_version(written)


@triton.jit(do_not_specialize=["num_elements"])
def adam_kernel(
    param, grad, exp_avg, exp_avg_sq, half, num_elements, factor, decay, beta1, rest1, beta2, rest2, rate, scale, eps,
    IS_DECOUPLED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Overwrite param, exp_avg, exp_avg_sq and half. Grid: (blocks,)."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = first + tl.arange(0, BLOCK)
    if first + BLOCK <= num_elements:
        _update(
            param, grad, exp_avg, exp_avg_sq, half, i, None,
            factor, decay, beta1, rest1, beta2, rest2, rate, scale, eps, IS_DECOUPLED,
        )  # fmt: skip
    else:
        _update(
            param, grad, exp_avg, exp_avg_sq, half, i, i < num_elements,
            factor, decay, beta1, rest1, beta2, rest2, rate, scale, eps, IS_DECOUPLED,
        )  # fmt: skip


@triton.jit
def _update(
    param, grad, exp_avg, exp_avg_sq, half, i, mask, factor, decay, beta1, rest1, beta2, rest2, rate, scale, eps,
    IS_DECOUPLED: tl.constexpr,
):  # fmt: skip
    b_p = tl.load(param + i, mask=mask)
    b_g = tl.load(grad + i, mask=mask) * factor
    b_m = tl.load(exp_avg + i, mask=mask)
    b_v = tl.load(exp_avg_sq + i, mask=mask)
    if IS_DECOUPLED:
        b_p -= decay * b_p
    else:
        b_g += decay * b_p
    b_m = beta1 * b_m + rest1 * b_g
    b_v = beta2 * b_v + rest2 * b_g * b_g
    b_p -= rate * tl.div_rn(b_m, tl.sqrt_rn(b_v) * scale + eps)
    tl.store(param + i, b_p, mask=mask)
    tl.store(exp_avg + i, b_m, mask=mask)
    tl.store(exp_avg_sq + i, b_v, mask=mask)
    if half is not None:
        tl.store(half + i, b_p.to(half.dtype.element_ty), mask=mask)

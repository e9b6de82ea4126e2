"""The weight gradient of experts, written over a sum in float32 or added to it.

    total_e <- [total_e +] sum over the rows m of e of dy_m x_m^T

On a GPU without a fused kernel for it (before Hopper), ``grouped_mm`` rounds the gradient to the operands' dtype before
it is added.

Letters: M tokens, E experts, O and I sizes of outputs and inputs.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def grouped_weight_grad_(total: Tensor, dy: Tensor, x: Tensor, ends: Tensor, add: bool) -> None:
    """See :func:`linear_moe.kernels.grouped_weight_grad_`."""
    if dy.is_cuda and dy.dtype == torch.bfloat16 and len(dy):
        grad = weight_grad(dy, x, ends)
        total.add_(grad) if add else total.copy_(grad)
        return
    begin = 0
    for sum_e, end in zip(total, ends.tolist(), strict=True):
        grad_e = dy[begin:end].t().to(total.dtype) @ x[begin:end].to(total.dtype)
        sum_e.add_(grad_e) if add else sum_e.copy_(grad_e)
        begin = end


def weight_grad(dy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """The gradient ``[E, O, I]`` alone, in the operands' dtype, by one grouped product; there are tokens."""
    grad = F.grouped_mm(dy.t(), x, offs=ends)
    if not _clears_empty(grad.device):
        is_empty = F.pad(ends, (1, 0)).diff() == 0
        grad.masked_fill_(is_empty[:, None, None], 0.0)
    return grad


@cache
def _clears_empty(device: torch.device) -> bool:
    """Whether the gradient of an expert without tokens is zero as it comes: else all are read and written again."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9

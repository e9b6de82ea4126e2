"""The definition of the kernel in ``optimizer``, as those in ``reference``; the formulas are in ``adam``.

Letters: as in ``adam``.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    """The papers' algorithms, line by line, all elements at once."""
    t, g, p = step.item(), factor * grad, param.clone()
    if decoupled:
        p = p - lr * weight_decay * p
    else:
        g = g + weight_decay * p
    exp_avg.copy_(beta1 * exp_avg + (1 - beta1) * g)
    exp_avg_sq.copy_(beta2 * exp_avg_sq + (1 - beta2) * g**2)
    mean, square = exp_avg / (1 - beta1**t), exp_avg_sq / (1 - beta2**t)
    param.copy_(p - lr * mean / (square.sqrt() + eps))
    if half is not None:
        half.copy_(param)

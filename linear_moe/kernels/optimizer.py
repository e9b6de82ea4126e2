"""The public kernel of optimizers: arguments checked, then handed to the backend that is picked, as in ``ops``."""

from __future__ import annotations

import torch
from torch import Tensor

from linear_moe.kernels import checks, dispatch


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
    """One step of Adam or AdamW on one tensor, overwritten with its moments; formulas in ``kernels/adam.py``.

    What ``torch.optim`` computes from ``factor * grad``, up to rounding. Nothing is differentiable.

    Args:
        param: any shape, float32 (any float dtype in torch).
        grad: same shape and dtype; not overwritten.
        exp_avg: likewise, overwritten.
        exp_avg_sq: likewise, overwritten.
        half: same shape, any float dtype; becomes a copy of the new ``param``.
        step: 0-dim, steps with this one. On the CPU: its value is read.
        lr: learning rate.
        beta1: decay of ``exp_avg``.
        beta2: decay of ``exp_avg_sq``.
        eps: added to the root of the second moment.
        weight_decay: its strength.
        decoupled: AdamW's weight decay, which is not in the moments.
        factor: of the gradient, by which it is clipped.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    tensors = {"grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    checks.check_adam(param, tensors, half, step)
    options = dict(step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
    with torch.no_grad():
        dispatch.run(
            "adam_", param, param, *tensors.values(), half, **options, decoupled=decoupled, factor=factor
        )

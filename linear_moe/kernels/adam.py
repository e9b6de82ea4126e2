"""One step of Adam on one tensor, after clipping: torch's own, and the copy in half precision.

    g <- factor g                                        clipping: the norm is known before
    g <- g + weight_decay p                              Adam (arXiv:1412.6980, algorithm 1; decay as a penalty)
    p <- p - lr weight_decay p                           or AdamW (arXiv:1711.05101, algorithm 2): decoupled
    m <- beta1 m + (1 - beta1) g,   v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    half <- p

Letters: p parameter, g gradient, m and v moments, t steps, this one included.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adam import adam


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
    """See :func:`linear_moe.kernels.adam_`."""
    adam(
        [param],
        [grad * factor],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step - 1],
        foreach=False,
        fused=False,
        decoupled_weight_decay=decoupled,
        amsgrad=False,
        maximize=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
    )
    if half is not None:
        half.copy_(param)

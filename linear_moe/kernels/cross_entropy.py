"""Cross entropy of logits that turn into its gradient where they are: two passes, no copy of them.

    loss_t = log sum_v exp(x_tv) - x_{t, label},    x_tv <- weight_t (exp(x_tv) / sum_u exp(x_tu) - [v = label_t])

The vocabulary may be cut over ranks: between the passes, ``combine`` makes statistics of a slice those of the whole.

Letters: M tokens, V logits here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Statistics = tuple[Tensor, Tensor, Tensor]
"""Largest logit, sum of exp(logit - largest), and logit of the label (0 without it), ``[M]`` each, float32 at least."""


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    combine: Callable[[Statistics], Statistics] | None = None,
) -> Tensor:
    """See :func:`linear_moe.kernels.cross_entropy_`."""
    return with_passes(statistics, gradient_, logits, labels, weight, combine)


def with_passes(
    read: Callable[[Tensor, Tensor], Statistics],
    write: Callable[[Tensor, Tensor, Tensor, Tensor], None],
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    combine: Callable[[Statistics], Statistics] | None,
) -> Tensor:
    """What every backend does around its two passes."""
    found = read(logits, labels)
    largest, total, picked = found if combine is None else combine(found)
    log_sum = largest + total.log()
    write(logits, labels, log_sum, weight)
    return log_sum - picked


def statistics(logits: Tensor, labels: Tensor) -> Statistics:
    """The first pass in torch."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = wide.amax(-1)
    is_here = (labels >= 0) & (labels < wide.shape[-1])
    picked = wide.gather(-1, torch.where(is_here, labels, 0).unsqueeze(-1)).squeeze(-1)
    return largest, (wide - largest.unsqueeze(-1)).exp_().sum(-1), torch.where(is_here, picked, 0.0)


def gradient_(logits: Tensor, labels: Tensor, log_sum: Tensor, weight: Tensor) -> None:
    """The second pass in torch; overwrites ``logits``."""
    softmax = (logits.to(log_sum.dtype) - log_sum.unsqueeze(-1)).exp_()
    is_here = (labels >= 0) & (labels < logits.shape[-1])
    at = torch.where(is_here, labels, 0).unsqueeze(-1)
    softmax.scatter_add_(-1, at, -is_here.to(softmax.dtype).unsqueeze(-1))
    logits.copy_(softmax.mul_(weight.to(softmax.dtype).unsqueeze(-1)))

"""Gates with a lower bound, in float32 whatever the dtype of their logits: log decays are summed over the sequence.

    k = 1 - a = (1 - b) sigmoid(-x)    a = b + (1 - b) sigmoid(x)    b = sigmoid(c)

1 - a is the product of 1 - sigmoid(c) and 1 - sigmoid(x), so the odds of a are (1 + e^c) (1 + e^x) - 1, a sum of three
positive numbers: no difference is taken, neither where a is near 1 nor where b is nearly nothing.

Letters: B batch, T tokens, H heads, K channels of a head.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.kernels.recompute import recompute


def bounded_decay_of(x: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`linear_moe.kernels.bounded_decay_of`."""
    return cast(tuple[Tensor, Tensor], recompute(_compute, None, (x,), (bound,)))


def _compute(x: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    log_odds = torch.logaddexp(torch.logaddexp(x, bound), x + bound)
    # The gradient of torch's sigmoid is a difference of numbers near 1; that of its logarithm is none.
    return torch.exp(F.logsigmoid(-x) + F.logsigmoid(-bound)), F.logsigmoid(log_odds)

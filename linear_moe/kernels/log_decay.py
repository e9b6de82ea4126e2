"""Log decays from logits, in float32 whatever the dtype of these: they are summed over the whole sequence.

    y = -scale * rate * f(x + bias),    f softplus, softplus of minus that, sigmoid or exp

Letters: B batch, T tokens, H heads, K channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.kernels.recompute import recompute

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": F.softplus,
    "log_sigmoid": lambda x: -F.logsigmoid(x),
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
}
"""f by its name; ``log_sigmoid`` is named after what ``-f`` is."""


def log_decay_of(
    x: Tensor,
    rate: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    form: str = "softplus",
    scale: float = 1.0,
) -> Tensor:
    """See :func:`linear_moe.kernels.log_decay_of`."""
    # Not the first result, which would be rounded to the dtype of x.
    _, y = recompute(partial(_compute, form, scale), None, (x,), (rate, bias))
    return cast(Tensor, y)


def _compute(
    form: str, scale: float, x: Tensor, rate: Tensor | None, bias: Tensor | None
) -> tuple[None, Tensor]:
    f = FORMS[form](x if bias is None else x + bias)
    return None, f * (-scale if rate is None else -scale * rate.unsqueeze(-1))

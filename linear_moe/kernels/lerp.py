"""Mixes of two tensors, channel by channel, such as of each token and the one before it: RWKV's token shift.

    y_n = x + m_n (other - x),    m_n = weight_n + logits_n, or the sigmoid of that

Computes in float32 whatever the dtype of x.

Letters: B batch, T tokens, N mixes, D channels.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from linear_moe.kernels.recompute import recompute


def lerp_tokens(
    x: Tensor,
    other: Tensor,
    weight: Tensor | None = None,
    logits: Tensor | None = None,
    *,
    activation: str | None = None,
) -> tuple[Tensor, ...]:
    """See :func:`linear_moe.kernels.lerp_tokens`."""
    (y_NBTD,) = recompute(partial(_lerp, activation), None, (x, other, logits), (weight,))
    assert y_NBTD is not None
    return y_NBTD.unbind(0)


def _lerp(
    activation: str | None, x: Tensor, other: Tensor, logits: Tensor | None, weight: Tensor | None
) -> tuple[Tensor]:
    share: Tensor | float = 0.0 if logits is None else logits.movedim(2, 0)
    share = share if weight is None else share + weight[:, None, None]
    assert isinstance(share, Tensor)
    return (x + (torch.sigmoid(share) if activation == "sigmoid" else share) * (other - x),)

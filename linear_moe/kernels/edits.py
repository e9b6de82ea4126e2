"""What RWKV7 makes of a key and an in-context learning rate, in float32 whatever their dtype.

    u = scale k,   n = u / sqrt(sum u^2 + 1e-6),   s = sigmoid(x)
    k' = k (1 + (s - 1) strength),   a = -n,   b = s n

Letters: B batch, T tokens, H heads, K channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linear_moe.kernels.recompute import recompute

EPS = 1e-6
"""Added to the sum of squares, as in the common library."""


def edit_keys(k: Tensor, logits: Tensor, scale: Tensor, strength: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`linear_moe.kernels.edit_keys`."""
    # Stacked: only the first result comes in the dtype of k.
    (found,) = recompute(_edit, None, (k, logits), (scale, strength))
    assert found is not None
    written, removed, added = found.unbind(0)
    return written, removed, added


def _edit(k: Tensor, logits: Tensor, scale: Tensor, strength: Tensor) -> tuple[Tensor]:
    u, rate = k * scale, torch.sigmoid(logits)
    unit = u * torch.rsqrt(u.square().sum(-1, keepdim=True) + EPS)
    return (torch.stack([k * (1 + (rate - 1) * strength), -unit, unit * rate]),)

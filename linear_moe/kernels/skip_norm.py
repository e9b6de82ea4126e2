"""What Mamba2 does with what it read: a skip, the gate, then one RMS norm for the heads of a group. Others norm alone.

    y = w * p / sqrt(mean(p^2) + eps),    p = (x + d * skip) * act(gate)

The mean is over all channels of a group of heads; d is a number per head, w one per channel. Computes in float32
whatever the dtype of x.

Letters: B batch, T tokens, H heads, G groups of heads, V width of a head.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.kernels.recompute import recompute


def skip_gate_norm(
    x: Tensor,
    skip: Tensor | None,
    skip_weight: Tensor | None,
    weight: Tensor,
    gate: Tensor | None = None,
    *,
    num_groups: int = 1,
    activation: str = "swish",
    eps: float = 1e-6,
) -> Tensor:
    """See :func:`linear_moe.kernels.skip_gate_norm`."""
    core = partial(_normalize, num_groups, activation, eps)
    (y,) = recompute(core, None, (x, skip, gate), (skip_weight, weight))
    return cast(Tensor, y)


def _normalize(
    num_groups: int,
    activation: str,
    eps: float,
    x: Tensor,
    skip: Tensor | None,
    gate: Tensor | None,
    skip_weight: Tensor | None,
    weight: Tensor,
) -> tuple[Tensor]:
    y = x if skip is None or skip_weight is None else x + skip_weight.unsqueeze(-1) * skip
    if gate is not None:
        y = y * (F.silu(gate) if activation == "swish" else torch.sigmoid(gate))
    groups = y.flatten(-2).unflatten(-1, (num_groups, -1))
    groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)
    return (groups.flatten(-2).view_as(y) * weight,)

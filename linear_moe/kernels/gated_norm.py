"""RMS or group norm of the last dimension, its weight and a gate, in float32 whatever the dtype of x.

    y = x / sqrt(mean(x^2) + eps) * scale * weight * act(gate)
    y = ((x - mean(x)) / sqrt(var(x) + eps) * weight + bias + sum_K(q bonus k) v) * act(gate)

Without weight and gate, with scale 1 / sqrt(D) and eps / D, the first is the L2 norm of queries and keys.

Letters: B batch, T tokens, H heads, D width of a head, K of its keys.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.kernels.recompute import recompute


def gated_rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    activation: str = "swish",
    eps: float = 1e-6,
    scale: float = 1.0,
) -> Tensor:
    """See :func:`linear_moe.kernels.gated_rms_norm`."""
    core = partial(_normalize, activation, eps, scale)
    (y,) = recompute(core, None, (x, gate), (weight,))
    return cast(Tensor, y)


def _normalize(
    activation: str, eps: float, scale: float, x: Tensor, gate: Tensor | None, weight: Tensor | None
) -> tuple[Tensor]:
    y = x * (torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * scale)
    if weight is not None:
        y = y * weight
    if gate is not None:
        y = y * (F.silu(gate) if activation == "swish" else torch.sigmoid(gate))
    return (y,)


def gated_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor | None = None,
    q: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    bonus: Tensor | None = None,
    *,
    activation: str | None = "swish",
    eps: float = 1e-5,
) -> Tensor:
    """See :func:`linear_moe.kernels.gated_group_norm`."""
    core = partial(_standardize, activation, eps)
    (y,) = recompute(core, None, (x, gate, q, k, v), (weight, bias, bonus))
    return cast(Tensor, y)


def _standardize(
    activation: str | None,
    eps: float,
    x: Tensor,
    gate: Tensor | None,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    bonus: Tensor | None,
) -> tuple[Tensor]:
    y = F.layer_norm(x, x.shape[-1:], eps=eps) * weight + bias
    if q is not None and k is not None and v is not None and bonus is not None:
        y = y + (q * k * bonus).sum(-1, keepdim=True) * v
    if gate is not None and activation is not None:
        gate = F.silu(gate) if activation == "swish" else torch.sigmoid(gate)
    return (y if gate is None else y * gate,)

"""The gated unit of an expert, weighted by the router: one read of both halves, one write.

    y_m = weight_m * silu(x_m[:F]) * x_m[F:]

Letters: M rows, F width of a unit.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor

from linear_moe.kernels.recompute import recompute


def weighted_swiglu(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`linear_moe.kernels.weighted_swiglu`."""
    (y,) = recompute(_unit, None, (x,), (weight,))
    return cast(Tensor, y)


def _unit(x: Tensor, weight: Tensor) -> tuple[Tensor]:
    gate, up = x.chunk(2, dim=-1)
    return (F.silu(gate) * up * weight.unsqueeze(-1),)

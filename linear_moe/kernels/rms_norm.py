"""The norm of a residual stream, by PyTorch's own.

    y = x / sqrt(mean(x^2) + eps) * weight

Letters: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """See :func:`linear_moe.kernels.rms_norm`."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps).to(x.dtype), x

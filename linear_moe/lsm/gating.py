"""Element-wise maths that several mixers' gates share: SiLU, unit keys, decay from a rate and a step, write strength.

    a_t    = exp(-exp(A_log) softplus(x_t + dt_bias))      A_log per head, dt_bias per head or per channel
    beta_t = sigmoid(b_t), or twice that

Letters: B runs, T tokens, H heads, K key dim.
Source: arXiv:2312.00752 (rate and step); initialisation as in the common library.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.kernels import gated_rms_norm
from linear_moe.lsm.tables import widen


def init_log_rate(x: Tensor, least: float = 1.0) -> None:
    """``A_log``: the logarithm of a rate drawn uniformly from ``least`` to 16, and not below 1e-4."""
    x.uniform_(least, 16).clamp_min_(1e-4).log_()


def init_dt_bias(x: Tensor) -> None:
    """``dt_bias``: softplus of it is log-uniform between 0.001 and 0.1."""
    dt = x.uniform_(math.log(1e-3), math.log(1e-1)).exp_().clamp_min_(1e-4)
    x.copy_(dt + torch.log(-torch.expm1(-dt)))


def activated(x: Tensor, conv_size: int) -> Tensor:
    """SiLU, which the short convolution has applied already where there is one."""
    return x if conv_size else F.silu(x)


def unit(x: Tensor) -> Tensor:
    """L2 norm 1 over the last of ``[B, T, H, K]``, in x's dtype; 1e-6 under the root, as in the common library."""
    width = x.shape[-1]
    return gated_rms_norm(x, eps=1e-6 / width, scale=width**-0.5)


def write_strength(b_BTH1: Tensor, allow_neg_eigval: bool) -> Tensor:
    """``[B, T, H]`` in float32 at least: in (0, 1), or in (0, 2), where the transition may flip a direction."""
    return torch.sigmoid(widen(b_BTH1).squeeze(-1)) * (2 if allow_neg_eigval else 1)

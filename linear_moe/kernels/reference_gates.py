"""Definitions of the kernels in ``gates``, as those in ``reference``: one head after the other.

Letters: as in ``gates``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_decay_of(
    x: Tensor,
    rate: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    form: str = "softplus",
    scale: float = 1.0,
) -> Tensor:
    """One head after the other, by exponentials and their logarithms."""
    dtype, heads = torch.promote_types(x.dtype, torch.float32), []
    for h in range(x.shape[2]):
        z = x[:, :, h].to(dtype)
        z = z if bias is None else z + bias[h].to(dtype)
        nothing = torch.zeros_like(z)
        f = {
            "softplus": torch.logaddexp(nothing, z),
            "log_sigmoid": torch.logaddexp(nothing, -z),
            "sigmoid": 1 / (1 + torch.exp(-z)),
            "exp": torch.exp(z),
        }[form]
        heads.append(f * (-scale if rate is None else -scale * rate[h].to(dtype)))
    return torch.stack(heads, 2)


def bounded_decay_of(x: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """One head after the other, by logarithms of b, of 1 - b and of sigmoids; for a near 1, by that of 1 - (1 - a)."""
    dtype, keys, log_decays = torch.promote_types(x.dtype, torch.float32), [], []
    for h in range(x.shape[2]):
        z, c = x[:, :, h].to(dtype), bound[h].to(dtype)
        nothing = torch.zeros((), dtype=dtype, device=x.device)
        log_b, log_rest = -torch.logaddexp(nothing, -c), -torch.logaddexp(nothing, c)
        k = torch.exp(log_rest - torch.logaddexp(nothing, z))
        log_a = torch.logaddexp(log_b, log_rest - torch.logaddexp(nothing, -z))
        keys.append(k)
        log_decays.append(torch.where(k < 0.5, torch.log1p(-k.clamp(max=0.5)), log_a))
    return torch.stack(keys, 2).to(x.dtype), torch.stack(log_decays, 2)

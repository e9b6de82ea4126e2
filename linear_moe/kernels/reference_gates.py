"""Definitions of the kernels in ``gates``, as those in ``reference``: one head, or one token, after the other.

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


def lerp_tokens(
    x: Tensor,
    other: Tensor,
    weight: Tensor | None = None,
    logits: Tensor | None = None,
    *,
    activation: str | None = None,
) -> tuple[Tensor, ...]:
    """One mix and one token after the other."""
    dtype, found = torch.promote_types(x.dtype, torch.float32), []
    for n in range(len(weight) if weight is not None else logits.shape[2] if logits is not None else 0):
        tokens = []
        for t in range(x.shape[1]):
            share = x.new_zeros(x.shape[-1], dtype=dtype) if weight is None else weight[n].to(dtype)
            share = share if logits is None else share + logits[:, t, n].to(dtype)
            share = 1 / (1 + torch.exp(-share)) if activation == "sigmoid" else share
            tokens.append((1 - share) * x[:, t].to(dtype) + share * other[:, t].to(dtype))
        found.append(torch.stack(tokens, 1).to(x.dtype))
    return tuple(found)


def edit_keys(k: Tensor, logits: Tensor, scale: Tensor, strength: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One head of a token after the other."""
    dtype = torch.promote_types(k.dtype, torch.float32)
    found = []
    for t in range(k.shape[1]):
        heads = []
        for h in range(k.shape[2]):
            key, rate = k[:, t, h].to(dtype), 1 / (1 + torch.exp(-logits[:, t, h].to(dtype)))
            scaled = key * scale[h].to(dtype)
            unit = scaled / torch.sqrt((scaled * scaled).sum(-1, keepdim=True) + 1e-6)
            weakened = (1 - strength[h].to(dtype)) * key + strength[h].to(dtype) * rate * key
            heads.append(torch.stack([weakened, -unit, rate * unit]))
        found.append(torch.stack(heads, 2))
    written, removed, added = torch.stack(found, 2).to(k.dtype).unbind(0)
    return written, removed, added


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
    """One head after the other."""
    dtype, heads = torch.promote_types(x.dtype, torch.float32), []
    for h in range(x.shape[2]):
        y = x[:, :, h].to(dtype)
        y = y - y.mean(-1, keepdim=True)
        y = y / torch.sqrt((y * y).mean(-1, keepdim=True) + eps) * weight[h].to(dtype) + bias[h].to(dtype)
        if q is not None and k is not None and v is not None and bonus is not None:
            for i in range(q.shape[-1]):
                own = (q[:, :, h, i] * k[:, :, h, i]).to(dtype) * bonus[h, i].to(dtype)
                y = y + own.unsqueeze(-1) * v[:, :, h].to(dtype)
        if gate is not None:
            g = gate[:, :, h].to(dtype)
            open_ = 1 / (1 + torch.exp(-g))
            y = y * {"swish": g * open_, "sigmoid": open_, None: g}[activation]
        heads.append(y)
    return torch.stack(heads, 2).to(x.dtype)

"""One token of every row, for decoding: the recurrences as they are written, in few passes over the memory.

    diagonal   S_t = a S + k v^T                   o = (a q)^T S + (q . k) v,      with bonus u: q^T S + (q . u k) v
    delta      S_t = a S + k w^T                   w = beta (v - (a k)^T S),       o = (a q)^T S + (q . k) w
    dplr       S_t = a S + b r^T + k v^T           r = a'^T S,                     o = (a q)^T S + (q . b) r + (q . k) v

What is read of the memory S before this token is one product, so S is read for it once. The chunked kernels would build
chunks of one token and, for the delta rule, a K x K matrix per head. Without gradients; nothing waits for the device.

Letters: B rows, G query/key heads, H heads, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def takes(*tensors: Any, cu_seqlens: Tensor | None = None, **options: Any) -> bool:
    """Whether a call of one token runs here: rows that are not packed, without gradients."""
    found = (x for x in (*tensors, *options.values()) if isinstance(x, Tensor))
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in found)
    return cu_seqlens is None and not wants_gradient


def diag_decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    log_decay_v: Tensor | None = None,
    bonus: Tensor | None = None,
    scale: float = 1.0,
    state: Tensor | None = None,
    cu_seqlens: None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`linear_moe.kernels.diag_decay`."""
    q_BHK, k_BHK, v_BHV = _tokens(v, q, k, v)
    memory = _memory(state, k_BHK, v_BHV)
    a_BHK, a_BHV = _decay(log_decay, v_BHV), _decay(log_decay_v, v_BHV)
    if bonus is None:
        (old_BHV,) = _read(memory, _times(q_BHK, a_BHK))
        old_BHV = _times(old_BHV, a_BHV)
        o_BHV = old_BHV + (q_BHK * k_BHK).sum(-1, keepdim=True) * v_BHV
    else:
        (old_BHV,) = _read(memory, q_BHK)
        o_BHV = old_BHV + (q_BHK * bonus.to(q_BHK.dtype) * k_BHK).sum(-1, keepdim=True) * v_BHV
    kept = _faded(memory, a_BHK)
    kept = kept if a_BHV is None else kept * a_BHV.unsqueeze(-2)
    return _output(o_BHV, scale, v), torch.addcmul(kept, k_BHK.unsqueeze(-1), v_BHV.unsqueeze(-2))


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    state: Tensor | None = None,
    cu_seqlens: None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`linear_moe.kernels.delta_rule`."""
    q_BHK, k_BHK, v_BHV = _tokens(v, q, k, v)
    memory = _memory(state, k_BHK, v_BHV)
    a_BHK = _decay(log_decay, v_BHV)
    held_BHV, old_BHV = _read(memory, _times(k_BHK, a_BHK), _times(q_BHK, a_BHK))
    w_BHV = beta[:, 0].to(v_BHV.dtype).unsqueeze(-1) * (v_BHV - held_BHV)
    o_BHV = old_BHV + (q_BHK * k_BHK).sum(-1, keepdim=True) * w_BHV
    memory = torch.addcmul(_faded(memory, a_BHK), k_BHK.unsqueeze(-1), w_BHV.unsqueeze(-2))
    return _output(o_BHV, scale, v), memory


def dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    state: Tensor | None = None,
    cu_seqlens: None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`linear_moe.kernels.dplr_delta_rule`."""
    q_BHK, k_BHK, v_BHV, a_BHK, b_BHK = _tokens(v, q, k, v, a, b)
    memory = _memory(state, k_BHK, v_BHV)
    decay_BHK = _decay(log_decay, v_BHV)
    r_BHV, old_BHV = _read(memory, a_BHK, _times(q_BHK, decay_BHK))
    o_BHV = old_BHV + (q_BHK * b_BHK).sum(-1, keepdim=True) * r_BHV
    o_BHV = o_BHV + (q_BHK * k_BHK).sum(-1, keepdim=True) * v_BHV
    keys_BHK2, values_BH2V = torch.stack([b_BHK, k_BHK], -1), torch.stack([r_BHV, v_BHV], -2)
    return _output(o_BHV, scale, v), _faded(memory, decay_BHK) + keys_BHK2 @ values_BH2V


OPERATIONS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "diag_decay": diag_decay,
    "delta_rule": delta_rule,
    "dplr_delta_rule": dplr_delta_rule,
}


def _tokens(v: Tensor, *x_B1GK: Tensor) -> list[Tensor]:
    """``[B, H, K]`` of each, in float32 or wider."""
    dtype, heads = torch.promote_types(v.dtype, torch.float32), v.shape[2]
    return [x[:, 0].to(dtype).repeat_interleave(heads // x.shape[2], dim=1) for x in x_B1GK]


def _memory(state: Tensor | None, k_BHK: Tensor, v_BHV: Tensor) -> Tensor:
    if state is None:
        return v_BHV.new_zeros(*k_BHK.shape, v_BHV.shape[-1])
    return state.to(v_BHV.dtype)


def _decay(log_decay: Tensor | None, v_BHV: Tensor) -> Tensor | None:
    """What is kept, ``[B | 1, H, K | 1]``."""
    if log_decay is None:
        return None
    log_a = log_decay[None] if log_decay.ndim == 1 else log_decay[:, 0]
    log_a = log_a.unsqueeze(-1) if log_a.ndim == 2 else log_a
    return log_a.to(v_BHV.dtype).exp()


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _faded(memory: Tensor, a_BHK: Tensor | None) -> Tensor:
    return memory if a_BHK is None else memory * a_BHK.unsqueeze(-1)


def _read(memory: Tensor, *x_BHK: Tensor) -> tuple[Tensor, ...]:
    """``[B, H, V]`` under each key."""
    return (torch.stack(x_BHK, dim=-2) @ memory).unbind(-2)


def _output(o_BHV: Tensor, scale: float, v: Tensor) -> Tensor:
    return (scale * o_BHV).to(v.dtype).unsqueeze(1)

"""Token-by-token definitions of every kernel: the truth that tests compare with, in plain differentiable torch.

    diagonal   S_t = a_t * S_{t-1} + k_t v_t^T            a_t = exp(log_decay_t) exp(log_decay_v_t)^T
               o_t = scale * S_t^T q_t                    with bonus: scale * (S_{t-1} + (u * k_t) v_t^T)^T q_t
    delta      S'  = a_t * S_{t-1}
               S_t = S' - beta_t k_t (k_t^T S') + beta_t k_t v_t^T,      o_t = scale * S_t^T q_t
    dplr       S_t = a_t * S_{t-1} + b_t (a'_t^T S_{t-1}) + k_t v_t^T,   o_t = scale * S_t^T q_t    (a' is argument a)

Nothing here is shared with the chunked code. Slow: one Python step for each token.

Letters: B batch, T tokens, G query/key heads, H heads, K key dim, V value dim, N documents, W convolution width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.kernels.reference_experts import grouped_weight_grad_  # noqa: F401
from linear_moe.kernels.reference_gates import (  # noqa: F401
    bounded_decay_of,
    edit_keys,
    gated_group_norm,
    lerp_tokens,
    log_decay_of,
)
from linear_moe.kernels.reference_optimizer import adam_  # noqa: F401
from linear_moe.kernels.reference_tokens import (  # noqa: F401
    choose_experts,
    collect_rows,
    cross_entropy_,
    sort_slots,
    spread_rows,
    weighted_swiglu,
)
from linear_moe.kernels.segment import Segment

TokenInputs = tuple[Tensor | None, ...]


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
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The diagonal-decay recurrence; shapes as in :func:`linear_moe.kernels.diag_decay`."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    num_heads = v.shape[2]
    log_decay = _per_token(log_decay, v)
    bonus = None if bonus is None else bonus.to(dtype)

    def run(tokens: TokenInputs, memory: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, log_a, log_a_v = (None if x is None else x.to(dtype) for x in tokens)
        a, a_v = _rows(_exp(log_a)), _columns(_exp(log_a_v))
        outputs = []
        for q_BHK1, k_BHK1, v_BH1V, a_t, a_v_t in _each_token(_rows(q), _rows(k), _columns(v), a, a_v):
            write_BHKV = k_BHK1 * v_BH1V
            read_BHKV = None if bonus is None else memory + bonus[:, :, None] * write_BHKV
            memory = memory if a_t is None else a_t * memory
            memory = memory if a_v_t is None else a_v_t * memory
            memory = memory + write_BHKV
            outputs.append((q_BHK1 * (memory if read_BHKV is None else read_BHKV)).sum(2))
        return scale * torch.stack(outputs, 1), memory

    tokens = (_repeat_heads(q, num_heads), _repeat_heads(k, num_heads), v, log_decay, log_decay_v)
    o, memory = _each_document(run, tokens, _initial(state, k, v, cu_seqlens, dtype), cu_seqlens, v)
    return o.to(v.dtype), memory


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The (gated) delta rule; shapes as in :func:`linear_moe.kernels.delta_rule`."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    num_heads = v.shape[2]
    log_decay = _per_token(log_decay, v)

    def run(tokens: TokenInputs, memory: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, beta, log_a = (None if x is None else x.to(dtype) for x in tokens)
        a, inputs = _rows(_exp(log_a)), (_rows(q), _rows(k), _columns(v), _rows(beta))
        outputs = []
        for q_BHK1, k_BHK1, v_BH1V, beta_BH11, a_t in _each_token(*inputs, a):
            memory = memory if a_t is None else a_t * memory
            erase_BHKV = k_BHK1 * (k_BHK1 * memory).sum(2, keepdim=True)
            memory = memory - beta_BH11 * erase_BHKV + beta_BH11 * (k_BHK1 * v_BH1V)
            outputs.append((q_BHK1 * memory).sum(2))
        return scale * torch.stack(outputs, 1), memory

    tokens = (_repeat_heads(q, num_heads), _repeat_heads(k, num_heads), v, beta, log_decay)
    o, memory = _each_document(run, tokens, _initial(state, k, v, cu_seqlens, dtype), cu_seqlens, v)
    return o.to(v.dtype), memory


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
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Diagonal plus low-rank transition; shapes as in :func:`linear_moe.kernels.dplr_delta_rule`."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    num_heads = v.shape[2]
    log_decay = _per_token(log_decay, v)

    def run(tokens: TokenInputs, memory: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, a, b, log_a = (None if x is None else x.to(dtype) for x in tokens)
        decay, inputs = _rows(_exp(log_a)), (_rows(q), _rows(k), _columns(v), _rows(a), _rows(b))
        outputs = []
        for q_BHK1, k_BHK1, v_BH1V, a_BHK1, b_BHK1, decay_t in _each_token(*inputs, decay):
            low_rank_BHKV = b_BHK1 * (a_BHK1 * memory).sum(2, keepdim=True)
            memory = memory if decay_t is None else decay_t * memory
            memory = memory + low_rank_BHKV + k_BHK1 * v_BH1V
            outputs.append((q_BHK1 * memory).sum(2))
        return scale * torch.stack(outputs, 1), memory

    q, k, a, b = (_repeat_heads(x, num_heads) for x in (q, k, a, b))
    memory = _initial(state, k, v, cu_seqlens, dtype)
    o, memory = _each_document(run, (q, k, v, a, b, log_decay), memory, cu_seqlens, v)
    return o.to(v.dtype), memory


def diag_decay_segment(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    log_decay_v: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Segment:
    """The memory a run leaves when it starts empty, and the sum of its log decays."""
    _, state = diag_decay(k, k, v, log_decay, log_decay_v=log_decay_v, cu_seqlens=cu_seqlens)
    dtype = torch.promote_types(v.dtype, torch.float32)
    total: Tensor | None = None
    if log_decay is not None:
        rows = _rows(_per_token(log_decay, v))
        total = _document_sum(rows.to(dtype), cu_seqlens)  # type: ignore[union-attr]
    if log_decay_v is not None:
        total_v = _document_sum(log_decay_v.unsqueeze(-2).to(dtype), cu_seqlens)
        total = total_v if total is None else total + total_v
    return Segment(state, log_decay=total)


def delta_rule_segment(
    k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, *, cu_seqlens: Tensor | None = None
) -> Segment:
    """The memory a run leaves when it starts empty, and what it makes of the identity when it writes nothing."""
    _, state = delta_rule(k, k, v, beta, log_decay, cu_seqlens=cu_seqlens)
    num_keys = k.shape[-1]
    nothing = v.new_zeros(*v.shape[:3], num_keys)
    identity = torch.eye(num_keys, dtype=state.dtype, device=v.device).expand(*state.shape[:2], -1, -1)
    _, decay = delta_rule(k, k, nothing, beta, log_decay, state=identity, cu_seqlens=cu_seqlens)
    return Segment(state, decay=decay)


def dplr_delta_rule_segment(
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Segment:
    """The memory a run leaves when it starts empty, and what it makes of the identity when it writes nothing."""
    _, state = dplr_delta_rule(k, k, v, a, b, log_decay, cu_seqlens=cu_seqlens)
    num_keys = k.shape[-1]
    nothing = v.new_zeros(*v.shape[:3], num_keys)
    identity = torch.eye(num_keys, dtype=state.dtype, device=v.device).expand(*state.shape[:2], -1, -1)
    _, decay = dplr_delta_rule(k, k, nothing, a, b, log_decay, state=identity, cu_seqlens=cu_seqlens)
    return Segment(state, decay=decay)


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution, one token at a time over a window of the last W inputs."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    num_documents = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if state is None:
        state = x.new_zeros(num_documents, weight.shape[-1] - 1, *x.shape[2:])

    def run(tokens: TokenInputs, window: Tensor) -> tuple[Tensor, Tensor]:
        (x_BTC,) = tokens
        assert x_BTC is not None
        outputs = []
        for t in range(x_BTC.shape[1]):
            window = torch.cat([window, x_BTC[:, t : t + 1].to(dtype)], 1)
            y = (window.movedim(1, -1) * weight.to(dtype)).sum(-1)
            y = y if bias is None else y + bias.to(dtype)
            outputs.append(F.silu(y) if activation == "silu" else y)
            window = window[:, 1:]
        return torch.stack(outputs, 1), window

    y, window = _each_document(run, (x,), state.to(dtype), cu_seqlens, x)
    return y.to(x.dtype), window.to(x.dtype)


def conv_and_split(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    widths: tuple[int, ...],
    activation: str | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The convolution, then torch's split of its output beside the other channels."""
    channels = weight.shape[1]
    options = dict(activation=activation, state=state, cu_seqlens=cu_seqlens)
    y, final = short_conv(x[..., :channels], weight, bias, **options)  # type: ignore[arg-type]
    return *torch.cat([y, x[..., channels:]], -1).split(widths, dim=-1), final


def gated_rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    activation: str = "swish",
    eps: float = 1e-6,
    scale: float = 1.0,
) -> Tensor:
    """RMS norm by PyTorch's own, one head at a time, then weight and gate."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    heads = []
    for h in range(x.shape[2]):
        weight_D = None if weight is None else weight.expand(x.shape[-2:])[h].to(dtype)
        y = F.rms_norm(x[:, :, h].to(dtype), x.shape[-1:], weight_D, eps) * scale
        if gate is not None:
            opening = torch.sigmoid(gate[:, :, h].to(dtype))
            y = y * (opening * gate[:, :, h].to(dtype) if activation == "swish" else opening)
        heads.append(y)
    return torch.stack(heads, 2).to(x.dtype)


def scale_heads(x: Tensor, weight: Tensor) -> Tensor:
    """One head after the other."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    heads = [x[:, :, h].to(dtype) * weight[:, :, h, None].to(dtype) for h in range(x.shape[2])]
    return torch.stack(heads, 2).to(x.dtype)


def rotate_heads(q: Tensor, k: Tensor, angles: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Two channels as a complex number, times ``scale e^(i angle)``, one head after the other."""
    dtype, num_angles = torch.promote_types(q.dtype, torch.float32), angles.shape[2]
    angles = angles.to(torch.promote_types(angles.dtype, dtype))
    turn = torch.polar(torch.full_like(angles, scale), angles).to(dtype.to_complex())
    found = []
    for x in (q, k):
        heads = []
        for h in range(x.shape[2]):
            y = x[:, :, h].to(dtype)
            pairs = torch.complex(y[..., :num_angles], y[..., num_angles : 2 * num_angles]) * turn
            heads.append(torch.cat([pairs.real, pairs.imag, y[..., 2 * num_angles :]], -1))
        found.append(torch.stack(heads, 2).to(x.dtype))
    return found[0], found[1]


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """One token after the other."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    normed = [
        x_D / (x_D.square().mean() + eps).sqrt() * weight.to(dtype) for x_D in x.to(dtype).flatten(0, 1)
    ]
    return torch.stack(normed).view(x.shape).to(x.dtype), x


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
    """One group of heads after the other, with PyTorch's own norm over its channels."""
    dtype, groups = torch.promote_types(x.dtype, torch.float32), []
    for heads in torch.arange(x.shape[2]).chunk(num_groups):
        at = slice(int(heads[0]), int(heads[-1]) + 1)
        y = x[:, :, at].to(dtype)
        if skip is not None and skip_weight is not None:
            y = y + skip_weight[at, None].to(dtype) * skip[:, :, at].to(dtype)
        if gate is not None:
            opening = torch.sigmoid(gate[:, :, at].to(dtype))
            y = y * (opening * gate[:, :, at].to(dtype) if activation == "swish" else opening)
        groups.append(F.rms_norm(y, y.shape[2:], weight[at].to(dtype), eps))
    return torch.cat(groups, 2).to(x.dtype)


def _each_document(
    run: Callable[[TokenInputs, Tensor], tuple[Tensor, Tensor]],
    tokens: TokenInputs,
    state: Tensor,
    cu_seqlens: Tensor | None,
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run each document on its own; tokens after the last document give zeros. Outputs are as wide as ``like``."""
    if cu_seqlens is None:
        return run(tokens, state)
    bounds = cu_seqlens.tolist()
    outputs, states = [], []
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        memory = state[n : n + 1]
        if end > start:
            o, memory = run(tuple(None if x is None else x[:, start:end] for x in tokens), memory)
            outputs.append(o)
        states.append(memory)
    outputs.append(state.new_zeros(1, like.shape[1] - bounds[-1], *like.shape[2:]))
    return torch.cat(outputs, 1), torch.cat(states)


def _document_sum(x_BT: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """``[B, T, ...]`` to ``[N, ...]``."""
    if cu_seqlens is None:
        return x_BT.sum(1)
    bounds = cu_seqlens.tolist()
    return torch.stack([x_BT[0, start:end].sum(0) for start, end in itertools.pairwise(bounds)])


def _initial(
    state: Tensor | None, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype
) -> Tensor:
    num_documents = v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if state is None:
        return torch.zeros(num_documents, v.shape[2], k.shape[3], v.shape[3], dtype=dtype, device=v.device)
    return state.to(dtype)


def _per_token(log_decay: Tensor | None, v: Tensor) -> Tensor | None:
    if log_decay is None or log_decay.ndim > 1:
        return log_decay
    return log_decay.expand(v.shape[:3])


def _exp(log_decay: Tensor | None) -> Tensor | None:
    return None if log_decay is None else log_decay.exp()


def _rows(x: Tensor | None) -> Tensor | None:
    """``[B, T, H]`` or ``[B, T, H, K]``, to multiply the rows of every token's ``[B, H, K, V]``."""
    return x if x is None else x[..., None, None] if x.ndim == 3 else x[..., None]


def _columns(x_BTHV: Tensor | None) -> Tensor | None:
    """To multiply the columns of every token's ``[B, H, K, V]``."""
    return None if x_BTHV is None else x_BTHV[..., None, :]


def _each_token(*inputs: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """``x[:, t]`` of every input for t = 0, 1, ..; its backward pass is one operation, not one for each token."""
    return zip(*(itertools.repeat(None) if x is None else x.unbind(1) for x in inputs))


def _repeat_heads(x_BTGK: Tensor, num_heads: int) -> Tensor:
    return x_BTGK.repeat_interleave(num_heads // x_BTGK.shape[2], dim=2)

"""Diagonal-decay memories, parallel over chunks: what a chunk reads from the memory before it, plus its own scores.

    o = scale * (q read) S_before + (A * decay) v,    S_after = total * S_before + (k write)^T v

Letters: L chunks, B batch, T tokens, H heads, G query/key heads, C tokens in a chunk, K key dim, V value dim,
N documents. Source of the chunk form: arXiv:2312.06635 section 4.3. No code was taken.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor

from linear_moe.kernels.arriving import State
from linear_moe.kernels.chunks import Chunks, carry_states, cut
from linear_moe.kernels.decay import mix_values, repeat_heads, scores
from linear_moe.kernels.recompute import recompute
from linear_moe.kernels.recompute_scan import Scan, recompute_scan
from linear_moe.kernels.segment import Segment

# Far below the exponent at which exp() is 0 in any dtype, and finite: -inf times the 0 that starts a document is NaN.
LOG_FORGET = -1e9


def diag_decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    log_decay_v: Tensor | None = None,
    bonus: Tensor | None = None,
    scale: float = 1.0,
    state: State = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`linear_moe.kernels.diag_decay`."""
    chunks = cut(k, cu_seqlens)
    tokens = (q, k, v, per_token(log_decay, v), log_decay_v)
    scan = Scan(partial(_begin, scale), partial(_finish, chunks), chunks, len(tokens))
    return recompute_scan(scan, (*tokens, bonus), state)


def diag_decay_segment(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    log_decay_v: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Segment:
    """See :func:`linear_moe.kernels.diag_decay_segment`."""
    chunks = cut(k, cu_seqlens)
    core = partial(_segment_core, chunks)
    _, state, total = recompute(core, chunks, (k, v, per_token(log_decay, v), log_decay_v), ())
    assert state is not None
    return Segment(state, log_decay=total)


def per_token(log_decay: Tensor | None, v: Tensor) -> Tensor | None:
    """A constant per head, ``[H]``, as ``[B, T, H]``: packing pads it, and a padded slot must not decay."""
    if log_decay is None or log_decay.ndim > 1:
        return log_decay
    # wide before the expansion: its gradient is a sum over all tokens, and rounds once, after the sum
    return log_decay.to(torch.promote_types(log_decay.dtype, torch.float32)).expand(v.shape[:3])


Begun = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]
"""Outputs of an empty memory, what they read of another one, its columns' decay, and what chunks do to it."""


def _begin(
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    log_decay_v: Tensor | None,
    bonus: Tensor | None,
) -> Begun:
    num_heads = v.shape[2]
    q = q * scale
    (a,), around = scores([q], [k], log_decay, num_heads, read_first=bonus is not None)
    q, k = repeat_heads(q, num_heads), repeat_heads(k, num_heads)

    read_v = write_v = total_v = None
    if log_decay_v is None:
        o = a @ v
    else:
        o, around_v = mix_values(a, v, log_decay_v)
        read_v, write_v, total_v = around_v.read, around_v.write, around_v.total
    if bonus is not None:
        o = o + (q * bonus[:, None, :] * k).sum(-1, keepdim=True) * v

    write = _scaled(k, around.write).mT @ _scaled(v, write_v)
    return o, _scaled(q, around.read), read_v, _memory_decay(around.total, total_v, write), write


def _finish(chunks: Chunks, begun: Begun, state: Tensor | None) -> tuple[Tensor, Tensor]:
    o, read, read_v, decay, write = begun
    if state is None:
        state = write.new_zeros(chunks.num_documents, *write.shape[2:])
    before, final = carry_states(chunks, decay, write, state)
    return o + _scaled(read @ before, read_v), final


def _segment_core(
    chunks: Chunks,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    log_decay_v: Tensor | None,
) -> tuple[None, Tensor, Tensor | None]:
    if log_decay is not None and log_decay.ndim < k.ndim:
        log_decay = log_decay.unsqueeze(-1)
    k = repeat_heads(k, v.shape[2])
    total_k = None if log_decay is None else log_decay.sum(-2)
    total_v = None if log_decay_v is None else log_decay_v.sum(-2)
    write = _scaled(k, _write_decay(log_decay)).mT @ _scaled(v, _write_decay(log_decay_v))
    decay = _memory_decay(_exp(total_k), _exp(total_v), write)
    state = v.new_zeros(chunks.num_documents, *write.shape[2:])
    final = carry_states(chunks, decay, write, state)[1]

    totals = [] if total_k is None else [_document_sum(chunks, total_k.unsqueeze(-1))]
    if total_v is not None:
        totals.append(_document_sum(chunks, total_v.unsqueeze(-2)))
    return None, final, sum(totals[1:], totals[0]) if totals else None


def _document_sum(chunks: Chunks, x_LBHKV: Tensor) -> Tensor:
    """Sum over the chunks of each document. In order: an index_add would use atomics, and differ from run to run."""
    write = x_LBHKV.clamp(min=LOG_FORGET)
    ones = write.new_ones(write.shape[0], 1, 1, 1, 1)
    return carry_states(chunks, ones, write, write.new_zeros(chunks.num_documents, *write.shape[2:]))[1]


def _write_decay(log_decay: Tensor | None) -> Tensor | None:
    """What the write of each token keeps until the end of its chunk."""
    if log_decay is None:
        return None
    later = torch.cat([log_decay[..., 1:, :], torch.zeros_like(log_decay[..., :1, :])], -2)
    return later.flip(-2).cumsum(-2).flip(-2).exp()


def _memory_decay(total_k: Tensor | None, total_v: Tensor | None, write: Tensor) -> Tensor:
    """``[L, B, H, K | 1]`` and ``[L, B, H, V]`` to one factor for each element of the memory."""
    if total_k is None and total_v is None:
        return write.new_ones(write.shape[0], 1, 1, 1, 1)
    if total_v is None:
        return cast(Tensor, total_k).unsqueeze(-1)
    return _scaled(total_v.unsqueeze(-2), None if total_k is None else total_k.unsqueeze(-1))


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _exp(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.exp()

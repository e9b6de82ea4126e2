"""Memories with a diagonal plus low-rank transition (RWKV7's rule), parallel over chunks: the WY form.

    S_t = (diag(exp(log_decay_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T,     o_t = scale * S_t^T q_t

Token t writes b_t w_t^T + k_t v_t^T with w_t = S_{t-1}^T a_t. Inside a chunk the w solve a unit lower triangular
system, linear in the memory before the chunk:

    w = u + y S_before,   (I - A_ab) [u | y] = [A_ak v | a earlier]
    o = (q read) S_before + A_qb w + A_qk v
    S_after = (diag(total) + (b write)^T y) S_before + (b write)^T u + (k write)^T v

``a_t`` reads what the previous token reads: A_ab and A_ak are 0 on the diagonal, and ``earlier`` is ``read`` one token
before. So the rows of ``a`` move up by one token, are scored beside ``q``, and their scores move down again: both
share the decays inside the chunk, and their exponents are never positive.

Letters: L chunks, B batch, T tokens, H heads, G query/key heads, C tokens in a chunk, K key dim, V value dim,
N documents. Sources: arXiv:2503.14456 (the rule), arXiv:2406.06484 section 3 (WY form). No code was taken.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from linear_moe.kernels.arriving import State
from linear_moe.kernels.chunked_delta import (
    Begun,
    chunk_action,
    document_action,
    read_memory,
    solve_unit_lower,
)
from linear_moe.kernels.chunked_diag import per_token
from linear_moe.kernels.chunks import Chunks, cut
from linear_moe.kernels.decay import Decays, repeat_heads, scores
from linear_moe.kernels.recompute import recompute
from linear_moe.kernels.recompute_scan import Scan, recompute_scan
from linear_moe.kernels.segment import Segment


def dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    state: State = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`linear_moe.kernels.dplr_delta_rule`."""
    chunks = cut(k, cu_seqlens)
    tokens = (q, k, v, a, b, per_token(log_decay, v))
    scan = Scan(partial(_begin, scale), partial(read_memory, chunks), chunks, len(tokens))
    return recompute_scan(scan, tokens, state)


def dplr_delta_rule_segment(
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Segment:
    """See :func:`linear_moe.kernels.dplr_delta_rule_segment`."""
    chunks = cut(k, cu_seqlens)
    core = partial(_segment_core, chunks)
    _, state, decay = recompute(core, chunks, (k, v, a, b, per_token(log_decay, v)), ())
    assert state is not None
    return Segment(state, decay=decay)


def _begin(
    scale: float, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor | None
) -> Begun:
    num_heads, num_keys, num_values = v.shape[2], k.shape[-1], v.shape[-1]
    q = q * scale
    (a_qb, a_qk, next_ab, next_ak), around = scores([q, _up(a)], [b, k], log_decay, num_heads)
    q, k, a, b = (repeat_heads(x, num_heads) for x in (q, k, a, b))
    solved = _solve(next_ab, next_ak, v, a, around)
    o, read = (a_qb @ solved).split([num_values, num_keys], -1)
    read = read + (q if around.read is None else q * around.read)
    return o + a_qk @ v, read, *_action(k, v, b, solved, around)


def _segment_core(
    chunks: Chunks,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None,
) -> tuple[None, Tensor, Tensor]:
    num_heads = v.shape[2]
    (next_ab, next_ak), around = scores([_up(a)], [b, k], log_decay, num_heads)
    k, a, b = (repeat_heads(x, num_heads) for x in (k, a, b))
    decay, write = _action(k, v, b, _solve(next_ab, next_ak, v, a, around), around)
    return None, *document_action(chunks, decay, write)


def _solve(next_ab: Tensor, next_ak: Tensor, v: Tensor, a: Tensor, around: Decays) -> Tensor:
    """``[u | y]`` of the module docstring: ``[L, B, H, C, V + K]``. Row i of ``next_*`` belongs to token i + 1."""
    earlier = a
    if around.read is not None:
        earlier = _down(_up(a) * around.read, first=a[..., :1, :])
    u = next_ak @ v
    right = torch.cat([_down(u, first=torch.zeros_like(u[..., :1, :])), earlier], -1)
    return solve_unit_lower(-_down(next_ab, first=torch.zeros_like(next_ab[..., :1, :])), right)


def _action(k: Tensor, v: Tensor, b: Tensor, solved: Tensor, around: Decays) -> tuple[Tensor, Tensor]:
    """What a chunk does to a memory: ``[L, B, H, K, K]`` and ``[L, B, H, K, V]``."""
    decay, write = chunk_action(b, solved, around)
    kept = k if around.write is None else k * around.write
    return decay, write + kept.mT @ v


def _up(x: Tensor) -> Tensor:
    """Row i of the result is row i + 1 of ``[..., C, D]``, and the last one 0."""
    return torch.cat([x[..., 1:, :], torch.zeros_like(x[..., :1, :])], -2)


def _down(x: Tensor, *, first: Tensor) -> Tensor:
    """Row i of the result is row i - 1 of ``[..., C, D]``."""
    return torch.cat([first, x[..., :-1, :]], -2)

"""Delta-rule memories, parallel over chunks: the WY form.

Token t writes k_t w_t^T with w_t = beta_t (v_t - (a_t S_{t-1})^T k_t). Inside a chunk the w solve a unit lower
triangular system, linear in the memory before the chunk:

    w = u + y S_before,   (I + beta * tril(A_kk, -1)) [u | y] = beta * [v | -k read]
    o = (q read) S_before + A_qk w
    S_after = (diag(total) + (k write)^T y) S_before + (k write)^T u

so a chunk is one K x K matrix and one write, and the loop over chunks is one matmul a step.

Letters: L chunks, B batch, T tokens, H heads, G query/key heads, C tokens in a chunk, K key dim, V value dim,
N documents. Sources: arXiv:2406.06484 section 3, arXiv:2412.06464 section 3.3 (decay). No code was taken.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from linear_moe.kernels.arriving import State
from linear_moe.kernels.chunked_diag import per_token
from linear_moe.kernels.chunks import Chunks, carry_states, cut
from linear_moe.kernels.decay import Decays, blocks_below, merge_blocks, repeat_heads, scores
from linear_moe.kernels.once import once_differentiable
from linear_moe.kernels.recompute import recompute
from linear_moe.kernels.recompute_scan import Scan, recompute_scan
from linear_moe.kernels.segment import Segment


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    state: State = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`linear_moe.kernels.delta_rule`."""
    chunks = cut(k, cu_seqlens)
    tokens = (q, k, v, beta, per_token(log_decay, v))
    scan = Scan(partial(_begin, scale), partial(read_memory, chunks), chunks, len(tokens))
    return recompute_scan(scan, tokens, state)


def delta_rule_segment(
    k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, *, cu_seqlens: Tensor | None = None
) -> Segment:
    """See :func:`linear_moe.kernels.delta_rule_segment`."""
    chunks = cut(k, cu_seqlens)
    core = partial(_segment_core, chunks)
    _, state, decay = recompute(core, chunks, (k, v, beta, per_token(log_decay, v)), ())
    assert state is not None
    return Segment(state, decay=decay)


Begun = tuple[Tensor, Tensor, Tensor, Tensor]
"""Outputs of an empty memory, what they read of another one ``[L, B, H, C, K]``, and what chunks do to it."""


def _begin(scale: float, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None) -> Begun:
    num_heads = v.shape[2]
    q = q * scale
    (a_qk, a_kk), around = scores([q, k], [k], log_decay, num_heads)
    q, k = repeat_heads(q, num_heads), repeat_heads(k, num_heads)
    solved = _solve(a_kk, k, v, beta, around)
    o, read = (a_qk @ solved).split([v.shape[-1], k.shape[-1]], -1)
    read = read + (q if around.read is None else q * around.read)
    return o, read, *chunk_action(k, solved, around)


def read_memory(chunks: Chunks, begun: Begun, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs and the final memory."""
    o, read, decay, write = begun
    if state is None:
        state = write.new_zeros(chunks.num_documents, *write.shape[2:])
    before, final = carry_states(chunks, decay, write, state, dense=True)
    return o + read @ before, final


def _segment_core(
    chunks: Chunks, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None
) -> tuple[None, Tensor, Tensor]:
    num_heads = v.shape[2]
    (a_kk,), around = scores([k], [k], log_decay, num_heads)
    k = repeat_heads(k, num_heads)
    decay, write = chunk_action(k, _solve(a_kk, k, v, beta, around), around)
    return None, *document_action(chunks, decay, write)


def document_action(chunks: Chunks, decay: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
    """``[N, H, K, V]`` written and ``[N, H, K, K]`` kept by each document, from those of its chunks."""
    num_heads, num_keys, num_values = write.shape[2:]
    # Columns of a memory do not mix: beside the empty one, carry the identity, to which nothing is written.
    write = torch.nn.functional.pad(write, (0, num_keys))
    identity = torch.eye(num_keys, dtype=write.dtype, device=write.device)
    state = torch.nn.functional.pad(identity, (num_values, 0)).expand(chunks.num_documents, num_heads, -1, -1)
    final = carry_states(chunks, decay, write, state, dense=True)[1]
    return final[..., :num_values], final[..., num_values:]


def _solve(a_kk: Tensor, k: Tensor, v: Tensor, beta: Tensor, around: Decays) -> Tensor:
    """``[u | y]`` of the module docstring: ``[L, B, H, C, V + K]``."""
    beta = beta.unsqueeze(-1)
    read = k if around.read is None else k * around.read
    return solve_unit_lower(beta * a_kk, torch.cat([beta * v, -beta * read], -1))


def chunk_action(k: Tensor, solved: Tensor, around: Decays) -> tuple[Tensor, Tensor]:
    """What a chunk that writes ``k (u + y S)^T`` does to a memory: ``[L, B, H, K, K]`` and ``[L, B, H, K, V]``."""
    written = k if around.write is None else k * around.write
    num_keys = k.shape[-1]
    write, decay = (written.mT @ solved).split([solved.shape[-1] - num_keys, num_keys], -1)
    eye = torch.eye(num_keys, dtype=k.dtype, device=k.device)
    return decay + (eye if around.total is None else eye * around.total.unsqueeze(-1)), write


def solve_unit_lower(a: Tensor, y: Tensor) -> Tensor:
    """``x`` in ``(I + tril(a, -1)) x = y``; C a power of two."""
    return _SolveUnitLower.apply(a, y)


class _SolveUnitLower(torch.autograd.Function):
    """``X`` in ``(I + tril(A, -1)) X = Y``, by the inverse, which the backward pass needs again.

    The inverse grows by pairs of diagonal blocks, one matmul a level: on small matrices faster than LAPACK's
    substitution, which takes them one by one.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, y: Tensor) -> Tensor:
        inverse = torch.ones_like(a[..., :1]).unsqueeze(-1)
        for level in range(a.shape[-1].bit_length() - 1):
            left, right = inverse.unflatten(-3, (-1, 2)).unbind(-3)
            inverse = merge_blocks(inverse, -right @ (blocks_below(a, level) @ left))
        inverse = inverse.squeeze(-3)
        x = inverse @ y
        ctx.save_for_backward(inverse, x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        inverse, x = ctx.saved_tensors
        grad_y = inverse.mT @ grad
        return -(grad_y @ x.mT).tril(-1), grad_y

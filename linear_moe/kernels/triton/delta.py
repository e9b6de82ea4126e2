"""Fused delta rule, forward and backward, for decays that are none, per head, per token, or per row of the memory.

    S' = a_t * S_{t-1},    S_t = S' + beta_t k_t (v_t - S'^T k_t)^T,    o_t = scale * S_t^T q_t

Six kernels: delta_chunk.py solves every chunk by itself, delta_scan.py carries the memory from chunk to chunk,
delta_output.py reads it; backward, delta_scan.py carries its gradient, delta_pairs.py takes what tokens of a chunk give
each other, and delta_gradient.py does the rest. Decays per row have kernels of their own for the first step and the
last two, delta_levels.py, delta_vector_pairs.py and delta_vector_gradient.py, with the sums of delta_near.py; where
they are weak, delta_weak.py. Between forward and backward stay the inputs, the memory before every chunk, and what the
first two steps left. Nothing is atomic and nothing waits for the device. docs/kernels_delta.md has the derivation and
the bytes.

Letters: B batch, T tokens, Hqk query/key heads, H heads, K key dim, V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linear_moe.kernels.arriving import Early, State, Tensors, afterwards, meanwhile
from linear_moe.kernels.once import once_differentiable
from linear_moe.kernels.triton.delta_launch import DeltaChunks, Solved
from linear_moe.kernels.triton.layout import of_groups, rows_together
from linear_moe.kernels.triton.saved import save, saved


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
    """See :func:`linear_moe.kernels.delta_rule`; float32, float16 and bfloat16."""
    options = cu_seqlens, float(scale)
    memory, tokens, early = meanwhile(state, _Begun.of, (q, k, v, beta, log_decay), *options)
    return _DeltaRule.apply(*tokens, memory, *options, early)


@dataclass(frozen=True)
class _Begun:
    """What needs no memory."""

    q: Tensor
    k: Tensor
    v: Tensor
    chunks: DeltaChunks
    solved: Solved
    actions: tuple[Tensor, Tensor] | None
    """Of the pieces of rows, where those are cut."""

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
    ) -> _Begun:
        """Solve every chunk."""
        q, k, v = rows_together(q), rows_together(k), rows_together(v)
        chunks = DeltaChunks.plan(k, v, log_decay, cu_seqlens, scale)
        solved = chunks.solve(q, k, beta)
        return cls(q, k, v, chunks, solved, chunks.actions(solved, v, beta) if chunks.pieces > 1 else None)


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        early: Early | None,
    ) -> tuple[Tensor, Tensor]:
        begun = early.take() if early else _Begun.of(q, k, v, beta, log_decay, cu_seqlens, scale)
        q, k, v, chunks, solved = begun.q, begun.k, begun.v, begun.chunks, begun.solved
        initial = None if state is None else state.float().contiguous()
        states, errors, final, maps = chunks.forward(solved, v, beta, initial, begun.actions)
        o = chunks.output(solved, states, errors)

        ctx.early = early
        ctx.dtypes = beta.dtype, None if state is None else state.dtype
        save(ctx, chunks, q, k, v, beta, states, errors, maps, *solved.tensors())
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, d_final: Tensor | None) -> tuple[Any, ...]:
        chunks, q, k, v, beta, states, errors, maps, *solved = saved(ctx)
        solved = Solved(*solved)
        do = torch.zeros_like(v) if do is None else rows_together(do)
        d_final = None if d_final is None else d_final.contiguous()
        d_states, dv, d_initial = chunks.backward(solved, do, beta, d_final, maps)
        d_state = None if ctx.dtypes[1] is None else d_initial.to(ctx.dtypes[1])
        beta_dtype = ctx.dtypes[0]

        def of_tokens() -> Tensors:
            gradients = chunks.gradients(q, k, do, beta, solved, errors, dv, states, d_states)
            dq, dk, d_beta, d_decay = gradients
            return of_groups(dq, q), of_groups(dk, k), dv, d_beta.to(beta_dtype), d_decay

        return *afterwards(ctx.early, of_tokens, 5), d_state, None, None, None

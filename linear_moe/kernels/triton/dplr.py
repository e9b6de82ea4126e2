"""Fused diagonal plus low-rank memory (RWKV7's rule), forward and backward.

    S_t = (diag(exp(log_decay_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T,     o_t = scale * S_t^T q_t

dplr_chunk.py solves every chunk by itself, dplr_weak.py those whose decays are weak, dplr_scan.py carries the memory
from chunk to chunk and reads it; backward it carries its gradient and gives dv, dplr_gradient.py and dplr_weak.py
do the rest. Between forward and backward stay the inputs, the memory before every chunk, w, what tokens found under a,
and what the first kernels left. Nothing is atomic and nothing waits for the device. docs/kernels_dplr.md has the
derivation and the bytes.

Letters: B batch, T tokens, Hqk query/key heads, H heads, K key dim, V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linear_moe.kernels.arriving import Early, State, Tensors, afterwards, meanwhile
from linear_moe.kernels.once import once_differentiable
from linear_moe.kernels.triton.dplr_launch import DplrChunks, Solved, per_row
from linear_moe.kernels.triton.layout import of_groups, rows_together
from linear_moe.kernels.triton.saved import save, saved


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
    """See :func:`linear_moe.kernels.dplr_delta_rule`; float32, float16 and bfloat16."""
    options = cu_seqlens, float(scale)
    inputs = q, k, v, a, b, per_row(log_decay, k, v)
    memory, tokens, early = meanwhile(state, _Begun.of, inputs, *options)
    return _Dplr.apply(*tokens, memory, *options, early)


@dataclass(frozen=True)
class _Begun:
    """What needs no memory."""

    tokens: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    """q, k, v, a, b as the kernels take them."""
    chunks: DplrChunks
    solved: Solved
    actions: tuple[Tensor, Tensor] | None
    """Of the pieces of rows, where those are cut."""

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        log_decay: Tensor,
        cu_seqlens: Tensor | None,
        scale: float,
    ) -> _Begun:
        """Solve every chunk."""
        q, k, v, a, b = (rows_together(x) for x in (q, k, v, a, b))
        chunks = DplrChunks.plan(k, v, cu_seqlens, scale)
        solved = chunks.solve(q, k, a, b, log_decay)
        return cls((q, k, v, a, b), chunks, solved, chunks.actions(solved, v) if chunks.pieces > 1 else None)


class _Dplr(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        log_decay: Tensor,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        early: Early | None,
    ) -> tuple[Tensor, Tensor]:
        begun = early.take() if early else _Begun.of(q, k, v, a, b, log_decay, cu_seqlens, scale)
        (q, k, v, a, b), chunks, solved = begun.tokens, begun.chunks, begun.solved
        initial = None if state is None else state.float().contiguous()
        states, w, final, maps = chunks.forward(solved, v, initial, begun.actions)
        o = chunks.read(solved, v, states, w)

        ctx.early = early
        ctx.state_dtype = None if state is None else state.dtype
        save(ctx, chunks, q, k, v, a, b, log_decay, states, w, maps, *solved.tensors())
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, d_final: Tensor | None) -> tuple[Any, ...]:
        chunks, q, k, v, a, b, log_decay, states, w, maps, *found = saved(ctx)
        solved = Solved(*found)
        do = torch.zeros_like(v) if do is None else rows_together(do)
        d_final = None if d_final is None else d_final.contiguous()
        d_states, z, d_initial = chunks.backward(solved, do, d_final, maps)
        d_state = None if ctx.state_dtype is None else d_initial.to(ctx.state_dtype)

        def of_tokens() -> Tensors:
            dv = chunks.read(solved, do, d_states, z, reverse=True)
            tokens, memory = (q, k, a, b, log_decay), (w, z, states, d_states)
            dq, dk, da, db, d_decay = chunks.gradients(tokens, solved, v, do, memory)
            assert dq is not None and dk is not None
            return of_groups(dq, q), of_groups(dk, k), dv, of_groups(da, a), of_groups(db, b), d_decay

        return *afterwards(ctx.early, of_tokens, 6), d_state, None, None, None

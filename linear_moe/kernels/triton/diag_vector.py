"""Fused scan of a memory whose rows or columns decay element by element, forward and backward, with RWKV6's bonus.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T,    o_t = scale * S_t^T q_t                       rows decay
    S_t = S_{t-1} diag(a_t) + k_t v_t^T                                                   columns decay

One set of four steps serves both: diag_scale.py scales the two vectors along the dimension that decays (x reads, y
writes), diag_vector_scan.py carries the memory and its gradient with what is left, two products of plain matrices, and
diag_combine.py undoes the scaling for gradients. Where rows decay x, y, z, e are q, k, v and the gradient of o; where
columns decay they are the gradient of o, v, k and q, and the forward pass is what the other's backward pass computes
for q. docs/kernels.md has the derivation and the bytes.

Letters: B batch, T tokens, H heads, K key dim, V value dim, D the dim that decays, S segments, M chunks, G groups of
chunks, C tokens in a chunk, L = B * T.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linear_moe.kernels.arriving import Early, State, Tensors, afterwards, meanwhile
from linear_moe.kernels.once import once_differentiable
from linear_moe.kernels.triton.diag_vector_launch import Scaled, VectorScan
from linear_moe.kernels.triton.layout import of_groups, rows_together
from linear_moe.kernels.triton.saved import save, saved
from linear_moe.kernels.triton.states import Local


def decay_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    bonus: Tensor | None,
    state: State,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``log_decay`` ``[B, T, H, K]``, any strides."""
    options = cu_seqlens, scale, True
    memory, tokens, early = meanwhile(state, partial(_begin, options), (q, k, v, log_decay, bonus))
    return _RowDecay.apply(*tokens, memory, options, early)


def decay_columns(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: State,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``log_decay`` ``[B, T, H, V]``, any strides."""
    options = cu_seqlens, scale, False
    memory, tokens, early = meanwhile(state, partial(_begin, options), (q, k, v, log_decay))
    return _ColumnDecay.apply(*tokens, memory, options, early)


Options = tuple[Tensor | None, float, bool]
"""``cu_seqlens``, the scale, and whether rows decay."""


@dataclass(frozen=True)
class _Begun:
    """What needs no memory."""

    q: Tensor
    k: Tensor
    v: Tensor
    scan: VectorScan
    scaled: Scaled
    local: Local | None
    """What segments do to any memory, if rows are cut into several."""


def _begin(
    options: Options, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, bonus: Tensor | None = None
) -> _Begun:
    cu_seqlens, scale, decays_rows = options
    q, k, v = rows_together(q), rows_together(k), rows_together(v)
    u = None if bonus is None else bonus.float().contiguous()
    scan = VectorScan.plan(k, v, log_decay, u, cu_seqlens, scale, decays_rows=decays_rows)
    scaled = scan.scaled(q, k) if decays_rows else scan.scaled(None, v)
    y, z = (scaled.y, v) if decays_rows else (k, scaled.y)
    return _Begun(q, k, v, scan, scaled, scan.local_states(y, z, scaled.totals))


class _RowDecay(torch.autograd.Function):
    """Saves the scaled q and k and the pairs, 2.5 tensors of the size of q in all: a sixth of the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        bonus: Tensor | None,
        state: Tensor | None,
        options: Options,
        early: Early | None,
    ) -> tuple[Tensor, Tensor]:
        begun = early.take() if early else _begin(options, q, k, v, log_decay, bonus)
        q, k, v, scan, scaled = begun.q, begun.k, begun.v, begun.scan, begun.scaled
        before, final = scan.states_between(begun.local, state)
        states = scan.new_saved(v) if ctx.needs_input_grad[3] else None
        o = scan.rows(scaled, v, before, final, states)

        ctx.early = early
        ctx.dtypes = [None if x is None else x.dtype for x in (log_decay, bonus, state)]
        save(ctx, scan, q, k, v, before, states, *scaled.tensors())
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, d_final: Tensor | None) -> tuple[Any, ...]:
        scan, q, k, v, before, states, *scaled = saved(ctx)
        scaled = Scaled(*scaled)
        do = torch.zeros_like(v) if do is None else rows_together(do)
        assert scaled.x is not None
        local = scan.local_states(scaled.x, do, scaled.totals, reverse=True)
        after, d_state = scan.states_between(local, d_final, reverse=True)
        dv = scan.rows_back(scaled, do, after, d_state)
        *dtypes, state_dtype = ctx.dtypes
        d_initial = None if state_dtype is None else d_state.to(state_dtype)

        def of_tokens() -> Tensors:
            scaled_dx, pairs = scan.columns(scaled, do, v, before)
            scaled_dy, through = scan.columns_back(scaled, do, v, after, states)
            dq, dk, *decays = scan.combine(q, k, pairs, scaled_dx, scaled_dy, through, scaled.totals)
            d_log, d_bonus = (
                None if x is None or dtype is None else x.to(dtype) for x, dtype in zip(decays, dtypes)
            )
            return of_groups(dq, q), of_groups(dk, k), dv, d_log, d_bonus

        return *afterwards(ctx.early, of_tokens, 5), d_initial, None, None


class _ColumnDecay(torch.autograd.Function):
    """Saves what q reads of the memory before its chunk, and the pairs."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        state: Tensor | None,
        options: Options,
        early: Early | None,
    ) -> tuple[Tensor, Tensor]:
        begun = early.take() if early else _begin(options, q, k, v, log_decay)
        q, k, v, scan, scaled = begun.q, begun.k, begun.v, begun.scan, begun.scaled
        before, final = scan.states_between(begun.local, state)
        read, pairs = scan.columns(scaled, q, k, before, final)
        o = scan.combine_forward(v, pairs, read, scaled.totals)

        ctx.early = early
        ctx.dtypes = log_decay.dtype, None if state is None else state.dtype
        save(ctx, scan, q, k, v, before, read, pairs)
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, d_final: Tensor | None) -> tuple[Any, ...]:
        scan, q, k, v, before, read, pairs = saved(ctx)
        do = torch.zeros_like(v) if do is None else rows_together(do)
        scaled = scan.scaled(do, v)
        assert scaled.x is not None
        local = scan.local_states(q, scaled.x, scaled.totals, reverse=True)
        after, d_state = scan.states_between(local, d_final, reverse=True)
        dk = scan.rows_back(scaled, q, after, d_state)
        needs_decay = ctx.needs_input_grad[3]
        decay_dtype, state_dtype = ctx.dtypes
        d_initial = None if state_dtype is None else d_state.to(state_dtype)

        def of_tokens() -> Tensors:
            states = scan.new_saved(v) if needs_decay else None
            dq = scan.rows(scaled, k, before, None, states)
            scaled_dv, through = scan.columns_back(scaled, q, k, after, states)
            _, dv, d_log, _ = scan.combine(do, v, pairs, read, scaled_dv, through, scaled.totals)
            d_log = None if d_log is None else d_log.to(decay_dtype)
            return of_groups(dq, q), of_groups(dk, k), dv, d_log

        return *afterwards(ctx.early, of_tokens, 4), d_initial, None, None

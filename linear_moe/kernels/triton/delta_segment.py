"""Fused summary of what tokens do to a delta-rule memory, S_out = M S_in + N: no outputs are computed.

    S' = a_t * S_{t-1},    S_t = S' - beta_t k_t (S'^T k_t)^T + beta_t k_t v_t^T

Columns of the memory do not mix, so N is the scan of an empty memory and M that of the identity to which nothing is
written: delta_scan.py twice, with nothing kept but the ends. Backward both are scanned again, one after the other, now
with the memories of all chunks kept, and their gradients carried back; delta_gradient.py does the rest, without q. So
between forward and backward there are the inputs and the solved chunks only. docs/kernels_segments.md has the bytes.

Letters: B batch, T tokens, Hqk key heads, H heads, K key dim, V value dim, N documents.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from linear_moe.kernels.once import once_differentiable
from linear_moe.kernels.segment import Segment
from linear_moe.kernels.triton.chunk_launch import carried
from linear_moe.kernels.triton.delta_launch import DeltaChunks, Solved
from linear_moe.kernels.triton.layout import of_groups, rows_together
from linear_moe.kernels.triton.saved import save, saved


def delta_rule_segment(
    k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, *, cu_seqlens: Tensor | None = None
) -> Segment:
    """See :func:`linear_moe.kernels.delta_rule_segment`; float32, float16 and bfloat16."""
    state, decay = _DeltaSegment.apply(k, v, beta, log_decay, cu_seqlens)
    return Segment(state, decay=decay)


class _DeltaSegment(torch.autograd.Function):
    """N ``[N, H, K, V]`` and M ``[N, H, K, K]``, float32."""

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        k, v = rows_together(k), rows_together(v)
        chunks = DeltaChunks.plan(k, v, log_decay, cu_seqlens, 1.0)
        solved = chunks.solve(None, k, beta)
        maps, written = chunks.actions(solved, v, beta)
        save(ctx, chunks, k, v, beta, maps, written, *solved.tensors())
        ctx.set_materialize_grads(False)
        return after_pieces(maps, written), after_pieces(maps, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_state: Tensor | None, d_decay: Tensor | None) -> tuple[Any, ...]:
        of_values, k, v, beta, maps, written, *solved = saved(ctx)
        of_keys = replace(of_values, num_values=of_values.num_keys)
        solved = Solved(*solved)
        dv, found = None, []
        if d_state is not None:
            before = carried(maps, written, None)
            dv, *grads = _gradients(of_values, solved, k, v, beta, maps, before, d_state)
            found.append(grads)
        if d_decay is not None:
            before = carried(maps, None, of_values.identity()[:, 0])
            _, *grads = _gradients(of_keys, solved, k, None, beta, maps, before, d_decay)
            found.append(grads)
        if not found:
            return None, None, None, None, None
        dk, d_beta, d_log = (sum_of_parts(parts) for parts in zip(*found, strict=True))
        assert dk is not None and d_beta is not None
        return of_groups(dk, k), dv, d_beta.to(beta.dtype), d_log, None


def after_pieces(maps: Tensor, written: Tensor | None) -> Tensor:
    """The memory after the last piece, of an empty one, or without ``written`` of the identity: ``[N, H, K, V]``."""
    memory = (maps if written is None else written)[:, 0]
    with torch.autocast(maps.device.type, enabled=False):
        for piece in range(1, maps.shape[1]):
            memory = maps[:, piece] @ memory
            memory = memory if written is None else memory + written[:, piece]
    return memory


def _gradients(
    chunks: DeltaChunks,
    solved: Solved,
    k: Tensor,
    v: Tensor | None,
    beta: Tensor,
    maps: Tensor,
    before: Tensor,
    d_final: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of v, of k for every head, of beta and the decay: what the columns of N, or without v of M, give them."""
    after = carried(maps.mT.flip(1), None, d_final).flip(1)
    states, errors = chunks.new_states(), chunks.new_values()
    chunks.scan(solved, v, beta, before.flatten(0, 1).contiguous(), states, errors)
    d_states, dv = chunks.new_states(), chunks.new_values()
    chunks.scan_back(solved, None, beta, after.flatten(0, 1).contiguous(), d_states, dv)
    _, dk, d_beta, d_log = chunks.gradients(None, k, None, beta, solved, errors, dv, states, d_states)
    return dv, dk, d_beta, d_log


def sum_of_parts(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    """Of gradients by way of N and by way of M."""
    found = [x for x in parts if x is not None]
    return sum(found[1:], found[0]) if found else None

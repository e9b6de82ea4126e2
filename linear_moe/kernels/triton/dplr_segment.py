"""Fused summary of what tokens do to a diagonal plus low-rank memory, S_out = M S_in + N: no outputs are computed.

    S_t = (diag(exp(log_decay_t)) + b_t a_t^T) S_{t-1} + k_t v_t^T

Columns of the memory do not mix, so N is the scan of an empty memory and M that of the identity to which nothing is
written: dplr_scan.py twice, with nothing kept but the ends. Backward both are scanned again, one after the other, now
with the memories of all chunks kept, and their gradients carried back; dplr_gradient.py does the rest, without q. So
between forward and backward there are the inputs and the solved chunks only.

Letters: B batch, T tokens, Hqk key heads, H heads, K key dim, V value dim, N documents.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.autograd import Function

from linear_moe.kernels.once import once_differentiable
from linear_moe.kernels.segment import Segment
from linear_moe.kernels.triton.chunk_launch import carried
from linear_moe.kernels.triton.delta_segment import after_pieces, sum_of_parts
from linear_moe.kernels.triton.dplr_launch import DplrChunks, Solved, per_row
from linear_moe.kernels.triton.layout import of_groups, rows_together
from linear_moe.kernels.triton.saved import save, saved


def dplr_delta_rule_segment(
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Segment:
    """See :func:`linear_moe.kernels.dplr_delta_rule_segment`; float32, float16 and bfloat16."""
    state, decay = _DplrSegment.apply(k, v, a, b, per_row(log_decay, k, v), cu_seqlens)
    return Segment(state, decay=decay)


class _DplrSegment(Function):
    """N ``[N, H, K, V]`` and M ``[N, H, K, K]``, float32."""

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        k, v, a, b = (rows_together(x) for x in (k, v, a, b))
        chunks = DplrChunks.plan(k, v, cu_seqlens, 1.0)
        solved = chunks.solve(None, k, a, b, log_decay)
        maps, written = chunks.actions(solved, v)
        save(ctx, chunks, k, v, a, b, log_decay, maps, written, *solved.tensors())
        ctx.set_materialize_grads(False)
        return after_pieces(maps, written), after_pieces(maps, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_state: Tensor | None, d_decay: Tensor | None) -> tuple[Any, ...]:
        of_values, k, v, a, b, log_decay, maps, written, *found = saved(ctx)
        of_keys = replace(of_values, num_values=of_values.num_keys)
        solved, tokens = Solved(*found), (k, a, b, log_decay)
        dv, dk, parts = None, None, []
        if d_state is not None:
            before = carried(maps, written, None)
            dv, dk, *grads = _gradients(of_values, solved, tokens, v, maps, before, d_state)
            parts.append(grads)
        if d_decay is not None:
            before = carried(maps, None, of_values.identity()[:, 0])
            _, _, *grads = _gradients(of_keys, solved, tokens, None, maps, before, d_decay)
            parts.append(grads)
        if not parts:
            return None, None, None, None, None, None
        da, db, d_log = (sum_of_parts(of_one) for of_one in zip(*parts, strict=True))
        assert da is not None and db is not None
        return None if dk is None else of_groups(dk, k), dv, of_groups(da, a), of_groups(db, b), d_log, None


def _gradients(
    chunks: DplrChunks,
    solved: Solved,
    tokens: tuple[Tensor, Tensor, Tensor, Tensor],
    v: Tensor | None,
    maps: Tensor,
    before: Tensor,
    d_final: Tensor,
) -> tuple[Tensor | None, ...]:
    """Of v, and of k, a, b, log_decay, the ``tokens``, by way of N, or without v of M: of a, b, log_decay then."""
    after = carried(maps.mT.flip(1), None, d_final).flip(1)
    states, w = chunks.new_states(), chunks.new_values()
    chunks.scan(solved, v, before.flatten(0, 1).contiguous(), states, w)
    d_states, z = chunks.new_states(), chunks.new_values()
    chunks.scan(solved, None, after.flatten(0, 1).contiguous(), d_states, z, reverse=True)
    dv = None if v is None else chunks.read(solved, None, d_states, z, reverse=True)
    _, *grads = chunks.gradients((None, *tokens), solved, v, None, (w, z, states, d_states))
    return dv, *grads

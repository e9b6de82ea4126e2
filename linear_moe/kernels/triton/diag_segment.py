"""Fused summary of what tokens do to a memory that decays element by element: no outputs are computed.

    S_out = exp(total) * S_in + state      total: sum of log decays,  state = sum_j exp(log decays after j) * k_j v_j^T

Forward reads every input once (segment_state.py, states.py), and keeps for the backward pass (segment_gradient.py) the
inputs, the log decays of chunks, and the memory before every segment, which is as many as fill the device.
docs/kernels.md has the bytes.

Letters: B batch, T tokens, Hqk key heads, H heads, K key dim, V value dim, N documents, S segments, M chunks, D the dim
that decays (K, or V where columns do), Z the other, W numbers for each decay: D, or 1 where all rows decay alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linear_moe.kernels.once import once_differentiable
from linear_moe.kernels.segment import Segment
from linear_moe.kernels.triton import configs
from linear_moe.kernels.triton.layout import Layout, lay_out, of_groups, rows_together
from linear_moe.kernels.triton.saved import save, saved
from linear_moe.kernels.triton.segment_gradient import segment_gradient_kernel
from linear_moe.kernels.triton.segment_state import segment_after_kernel, segment_local_kernel
from linear_moe.kernels.triton.sizes import cdiv, next_power_of_2
from linear_moe.kernels.triton.states import diag_carry_kernel

NO_DECAY, HEAD_DECAY, TOKEN_DECAY, ROW_DECAY = 0, 1, 2, 3


def diag_decay_segment(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    log_decay_v: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Segment:
    """See :func:`linear_moe.kernels.diag_decay_segment`; dtypes and decays as in :func:`.diag.diag_decay`."""
    columns = log_decay_v is not None
    if log_decay_v is not None:
        if log_decay is not None:
            assert log_decay.ndim < 4
            log_decay_v = log_decay_v + log_decay.float()[..., None]
        log_decay = log_decay_v
    state, total = _DiagSegment.apply(k, v, log_decay, cu_seqlens, columns)
    if total is not None:
        total = total.unsqueeze(-2 if columns else -1)
    return Segment(state, log_decay=total)


class _DiagSegment(torch.autograd.Function):
    """``state`` ``[N, H, K, V]``, and the sum of log decays ``[N, H, W]`` or nothing."""

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, columns: bool
    ) -> tuple[Tensor, Tensor | None]:
        k, v = rows_together(k), rows_together(v)
        run = _Run.plan(k, v, log_decay, cu_seqlens, columns)
        state, total, found = run.forward(*run.roles(k, v))
        ctx.dtype = None if log_decay is None else log_decay.dtype
        save(ctx, run, k, v, *found)
        ctx.set_materialize_grads(False)
        return state, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_state: Tensor | None, d_total: Tensor | None) -> tuple[Any, ...]:
        run, k, v, *found = saved(ctx)
        grads = run.backward(*run.roles(k, v), d_state, d_total, found, ctx.needs_input_grad[2])
        dk, dv = run.roles(*grads[:2])
        d_log = None if grads[2] is None else grads[2].to(ctx.dtype)
        return of_groups(dk, k), dv, d_log, None, None


@dataclass(frozen=True)
class _Run:
    """Everything that the kernels of one call share; y and z as in segment_state.py."""

    layout: Layout
    num_heads: int
    num_keys: int
    num_values: int
    chunk: int
    decay: int
    log_decay: Tensor
    """``[H]``, ``[B, T, H]``, ``[B, T, H, D]``; without a decay anything."""
    columns: bool

    @classmethod
    def plan(
        cls, k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, columns: bool
    ) -> _Run:
        """Cut the rows, or the packed documents, into segments that fill the device."""
        rows, num_tokens, num_heads, num_values = v.shape
        decay = (
            NO_DECAY if log_decay is None else {1: HEAD_DECAY, 3: TOKEN_DECAY, 4: ROW_DECAY}[log_decay.ndim]
        )
        width = num_values if columns else k.shape[-1]
        chunk = configs.segment_chunk_size(width, v.dtype)
        processors = configs.num_processors(v.device)
        size = configs.segment_size(rows, num_tokens, num_heads, 1, chunk, processors)
        layout = lay_out(rows, num_tokens, size, cu_seqlens, like=v)
        log_decay = v if log_decay is None else log_decay.contiguous() if decay == HEAD_DECAY else log_decay
        return cls(layout, num_heads, k.shape[-1], num_values, chunk, decay, log_decay, columns)

    def roles(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """y, along the dimension that decays, and z; its own inverse."""
        return (v, k) if self.columns else (k, v)

    @property
    def width(self) -> int:
        """W."""
        return 1 if self.decay != ROW_DECAY else self.num_values if self.columns else self.num_keys

    def forward(self, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
        """The final memory, the sum of log decays, and for the backward pass: memories between, totals, after."""
        layout, num_heads, width = self.layout, self.num_heads, self.width
        final, states = self._memories(layout.num_documents), None
        local = final
        if layout.is_split:
            local = states = self._memories(layout.num_segments)
        has_decay = self.decay != NO_DECAY
        kept = self._floats(layout.num_segments, num_heads, width) if has_decay else final
        chunks = layout.num_slots(self.chunk), num_heads, width
        totals = torch.zeros(chunks, dtype=torch.float32, device=y.device) if has_decay else final
        cut = configs.segment_blocks(y.shape[-1], z.shape[-1], y.dtype, self.decay == ROW_DECAY)
        blocks = cdiv(y.shape[-1], cut.keys) * cdiv(z.shape[-1], cut.values)
        segment_local_kernel[(layout.num_segments * num_heads * blocks,)](
            y, z, self.log_decay, layout.plan, local, kept, totals, *self._places(y, z),
            **self._dims(y, z), BD=cut.keys, BZ=cut.values, num_warps=cut.num_warps, num_stages=cut.num_stages,
        )  # fmt: skip
        if states is not None:
            size, block = self.num_keys * self.num_values, 1024
            diag_carry_kernel[(layout.num_documents * num_heads * cdiv(size, block),)](
                states, kept, final, final, layout.first_segment, layout.segments_per_row, num_heads,
                SIZE=size, BLOCK=block, DECAY=self.decay, REVERSE=False, IS_PACKED=layout.is_packed,
                HAS_INITIAL=False, KEPT=width, SPAN=1 if self.columns else self.num_values, num_warps=4,
            )  # fmt: skip
        if not has_decay:
            return final, None, (None, None, None)
        after = torch.empty_like(totals)
        total = self._floats(layout.num_documents, num_heads, width)
        block = min(32, next_power_of_2(width))
        segment_after_kernel[(layout.num_documents * num_heads * cdiv(width, block),)](
            totals, after, total, layout.plan, layout.first_segment,
            layout.num_tokens, num_heads, layout.segment_size, layout.segments_per_row,
            W=width, BW=block, BM=64, C=self.chunk, IS_PACKED=layout.is_packed, num_warps=4,
        )  # fmt: skip
        return final, total, (states, totals, after)

    def backward(
        self,
        y: Tensor,
        z: Tensor,
        d_state: Tensor | None,
        d_total: Tensor | None,
        found: list[Tensor | None],
        needs_decay: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of y and z for every head, and of the log decay, float32."""
        layout, num_heads = self.layout, self.num_heads
        before, totals, after = found
        tokens = layout.num_rows, layout.num_tokens, num_heads
        dy, dz = (torch.empty(*tokens, x.shape[-1], dtype=x.dtype, device=x.device) for x in (y, z))
        if d_state is None:
            d_state = self._floats(1).zero_().expand(self._memory_shape(layout.num_documents))
        d_state = d_state.contiguous()
        if d_total is None:
            d_total = self._floats(layout.num_documents, num_heads, self.width).zero_()
        d_log: Tensor | None = None
        if needs_decay:
            of_head = self.decay == HEAD_DECAY
            shape = (layout.num_segments, num_heads) if of_head else self.log_decay.shape
            d_log = self._floats(*shape)
        cut = configs.segment_gradient_blocks(y.shape[-1], z.shape[-1], y.dtype)
        segment_gradient_kernel[(layout.num_segments * num_heads,)](
            y, z, self.log_decay, layout.plan, d_state, *(dy if x is None else x for x in (before, totals, after)),
            d_total.contiguous(), dy, dz, dy if d_log is None else d_log, *self._places(y, z),
            **self._dims(y, z), BD=cut.keys, BZ=cut.values, HAS_BEFORE=before is not None,
            HAS_DECAY_GRADIENT=needs_decay, num_warps=cut.num_warps, num_stages=cut.num_stages,
        )  # fmt: skip
        return dy, dz, d_log.sum(0) if d_log is not None and self.decay == HEAD_DECAY else d_log

    def _places(self, y: Tensor, z: Tensor) -> tuple[int, ...]:
        """Sizes and strides."""
        layout, a = self.layout, self.log_decay
        a_b, a_t, a_h, a_d = (*a.stride(), 1)[:4] if self.decay >= TOKEN_DECAY else (0, 0, 0, 0)
        sizes = layout.segment_size, layout.segments_per_row, layout.num_documents
        far = y.stride(0), y.stride(2), z.stride(0), z.stride(2), a_b, a_h
        return layout.num_tokens, self.num_heads, *sizes, *far, y.stride(1), z.stride(1), a_t, a_d

    def _dims(self, y: Tensor, z: Tensor) -> dict[str, Any]:
        strides = dict(S_D=1, S_Z=self.num_values) if self.columns else dict(S_D=self.num_values, S_Z=1)
        sharing = dict(Y_PER=self.num_heads // y.shape[2], Z_PER=self.num_heads // z.shape[2])
        sizes = dict(
            D=y.shape[-1], Z=z.shape[-1], C=self.chunk, DECAY=self.decay, IS_PACKED=self.layout.is_packed
        )
        return {**strides, **sharing, **sizes}

    def _memory_shape(self, count: int) -> tuple[int, int, int, int]:
        return count, self.num_heads, self.num_keys, self.num_values

    def _memories(self, count: int) -> Tensor:
        return self._floats(*self._memory_shape(count))

    def _floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.log_decay.device)

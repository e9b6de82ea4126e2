"""Fused diagonal-decay scan, forward and backward, for decays that are none, per head, or per token and head.

    S_t = a_t * S_{t-1} + k_t v_t^T,    o_t = scale * S_t^T q_t

Four runs of one kernel (diag_scan.py): o; then dq forward in time, dv and dk backward. When rows and heads alone do
not fill the device, and for packed documents, states.py first computes the memory at the start of every segment.
Nothing is atomic and nothing waits for the device. docs/kernels.md has the derivation and the bytes.

Letters: B batch, T tokens, Hqk query/key heads, H heads, K key dim, V value dim, N documents, S segments,
L = B * T, PR and PW blocks of K in the runs of dq and dk, G groups of chunks in a segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linear_moe.kernels.arriving import Early, State, Tensors, afterwards, meanwhile
from linear_moe.kernels.once import once_differentiable
from linear_moe.kernels.triton import configs, diag_vector
from linear_moe.kernels.triton.configs import (
    HEAD_DECAY,
    NO_DECAY,
    READS,
    TOKEN_DECAY,
    WITHOUT_GRADIENT,
    WRITES,
)
from linear_moe.kernels.triton.decay_sums import decay_gradient_kernel, decay_sums_kernel
from linear_moe.kernels.triton.diag_scan import diag_scan_kernel
from linear_moe.kernels.triton.layout import Layout, lay_out, of_groups, rows_together
from linear_moe.kernels.triton.saved import save, saved
from linear_moe.kernels.triton.sizes import cdiv, next_power_of_2
from linear_moe.kernels.triton.states import Local, diag_carry_kernel, diag_local_state_kernel

WIDEST = 128
"""Columns of v in one head of a scan."""


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
    """See :func:`linear_moe.kernels.diag_decay`; float32, float16 and bfloat16, no vector decay on both sides."""
    if log_decay_v is not None:
        if log_decay is not None:
            assert log_decay.ndim < 4
            log_decay_v = log_decay_v + log_decay.float()[..., None]
        return diag_vector.decay_columns(q, k, v, log_decay_v, state, cu_seqlens, float(scale))
    if bonus is not None:
        log_decay = torch.zeros((), dtype=torch.float32, device=v.device) if log_decay is None else log_decay
        if log_decay.ndim < 4:
            log_decay = log_decay[..., None].expand(*v.shape[:3], k.shape[-1])
    if log_decay is not None and log_decay.ndim == 4:
        return diag_vector.decay_rows(q, k, v, log_decay, bonus, state, cu_seqlens, float(scale))
    if v.shape[-1] > WIDEST and v.shape[-1] % WIDEST == 0:
        return _by_parts(q, k, v, log_decay, scale, state, cu_seqlens)
    options = cu_seqlens, float(scale)
    memory, tokens, early = meanwhile(state, _begin, (q, k, v, log_decay), *options)
    return _DiagDecay.apply(*tokens, memory, *options, early)


def _by_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: State,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Parts of wide values are heads of their own that share q, k and the decay.

    In the runs of dq and dk the values are keys: 256 of them leave room for blocks of 16 columns only. On an H100,
    B * T = 32768, 8 heads, K = 128, V = 256, a decay per head: 3.3 ms forward and backward without this.
    """
    parts = v.shape[-1] // WIDEST

    def part(memory: Tensor) -> Tensor:
        return memory.unflatten(-1, (parts, WIDEST)).transpose(2, 3).flatten(1, 2)

    o, final = diag_decay(
        q,
        k,
        v.unflatten(-1, (parts, WIDEST)).flatten(2, 3),
        None if log_decay is None else log_decay.repeat_interleave(parts, -1),
        scale=scale,
        state=(lambda: part(state())) if callable(state) else None if state is None else part(state),
        cu_seqlens=cu_seqlens,
    )
    return o.view(v.shape), final.unflatten(1, (-1, parts)).transpose(2, 3).flatten(-2)


def _begin(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, _Scan, Local | None]:
    """What needs no memory: q, k and v as kernels take them, sums of log decays, what segments do to any memory."""
    q, k, v = rows_together(q), rows_together(k), rows_together(v)
    scan = _Scan.plan(k, v, log_decay, cu_seqlens, scale)
    return q, k, v, scan, scan.local_states(k, v)


class _DiagDecay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        early: Early | None,
    ) -> tuple[Tensor, Tensor]:
        begun = early.take() if early else _begin(q, k, v, log_decay, cu_seqlens, scale)
        q, k, v, scan, local = begun
        initial = None if state is None else state.float().contiguous()
        before, final = scan.states_between(local, initial, k, v)
        states = scan.new_saved(k, v) if ctx.needs_input_grad[3] else None
        o = torch.empty_like(v, memory_format=torch.contiguous_format)
        scan.run(q, k, v, o, before, final=final, saved=states, saves=states is not None)

        ctx.early = early
        ctx.dtypes = None if log_decay is None else log_decay.dtype, None if state is None else state.dtype
        save(ctx, scan, q, k, v, before, states)
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, d_final: Tensor | None) -> tuple[Any, ...]:
        scan, q, k, v, before, states = saved(ctx)
        needs_q, needs_k, needs_v, needs_decay, needs_state = ctx.needs_input_grad[:5]
        do = torch.zeros_like(v) if do is None else rows_together(do)
        d_final = None if d_final is None else d_final.contiguous()
        local = scan.local_states(q, do, reverse=True)
        after, d_state = scan.states_between(local, d_final, q, do, reverse=True)

        dv: Tensor | None = None
        if needs_v or (needs_state and not scan.layout.is_split):
            dv = torch.empty_like(v, memory_format=torch.contiguous_format)
            scan.run(k, q, do, dv, after, final=d_state, reverse=True)
        d_initial = d_state.to(ctx.dtypes[1]) if needs_state else None
        decay_dtype = ctx.dtypes[0]

        def of_tokens() -> Tensors:
            parts = scan.new_parts(k, v) if needs_decay else None
            dq = _per_head(q, v) if needs_q or needs_decay else None
            dk = _per_head(k, v) if needs_k or needs_decay else None
            if dq is not None:
                scan.run(do, v, k, dq, before, is_transposed=True, x=q, parts=parts)
                dq = of_groups(dq, q)
            if dk is not None:
                scan.run(
                    v, do, q, dk, after, is_transposed=True, reverse=True, x=k, parts=parts, saved=states
                )
                dk = of_groups(dk, k)
            d_decay = None if parts is None else scan.decay_gradient(parts).to(decay_dtype)
            return dq, dk, dv, d_decay

        return *afterwards(ctx.early, of_tokens, 4), d_initial, None, None, None


@dataclass(frozen=True)
class _Parts:
    """What the runs of dq and dk leave for the gradient of the decay, float32."""

    read: Tensor
    """``[PR, H, L]``."""
    write: Tensor
    """``[PW, H, L]``."""
    through: Tensor
    """``[PW, groups of all segments, H]``."""


@dataclass(frozen=True)
class _Scan:
    """Everything that the runs of one call share."""

    layout: Layout
    num_heads: int
    scale: float
    chunk: int
    decay: int
    log_decay: Tensor
    sums: Tensor

    @classmethod
    def plan(
        cls, k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, scale: float
    ) -> _Scan:
        rows, num_tokens, num_heads, num_values = v.shape
        chunk = configs.diag_chunk_size(v.dtype)
        blocks = cdiv(num_values, configs.blocks(k.shape[-1], num_values, v.dtype).values)
        processors = configs.num_processors(v.device)
        size = configs.segment_size(rows, num_tokens, num_heads, blocks, chunk, processors)
        layout = lay_out(rows, num_tokens, size, cu_seqlens, like=v)
        if log_decay is None:
            return cls(layout, num_heads, scale, chunk, NO_DECAY, v, v)
        if log_decay.ndim == 1:
            return cls(layout, num_heads, scale, chunk, HEAD_DECAY, log_decay.contiguous(), v)
        shape = layout.num_slots(chunk), num_heads, 2, chunk
        sums = torch.empty(shape, dtype=torch.float32, device=v.device)
        scan = cls(layout, num_heads, scale, chunk, TOKEN_DECAY, log_decay, sums)
        heads = min(16, next_power_of_2(num_heads))
        chunks = cdiv(layout.segment_size, chunk)
        decay_sums_kernel[(layout.num_segments * chunks, cdiv(num_heads, heads))](
            log_decay, sums, layout.plan, *scan._sizes(), chunks, *log_decay.stride(),
            BH=heads, C=chunk, IS_PACKED=layout.is_packed, num_warps=2,
        )  # fmt: skip
        return scan

    def local_states(self, k: Tensor, v: Tensor, *, reverse: bool = False) -> Local | None:
        """What every segment leaves in an empty memory, and what it keeps of another; ``None`` if none is cut.

        Backward in time, k and v are q and the gradient of o.
        """
        layout, num_heads = self.layout, self.num_heads
        num_keys, num_values = k.shape[-1], v.shape[-1]
        if not layout.is_split:
            return None
        shape = layout.num_segments, num_heads, num_keys, num_values
        states = torch.empty(shape, dtype=torch.float32, device=v.device)
        totals = torch.empty(layout.num_segments, num_heads, dtype=torch.float32, device=v.device)
        cut = configs.blocks(num_keys, num_values, v.dtype)
        grid = (layout.num_segments * num_heads * cdiv(num_values, cut.values),)
        diag_local_state_kernel[grid](
            k, v, self.log_decay, self.sums, layout.plan, states, totals, *self._sizes(), self.scale,
            k.stride(0), k.stride(2), v.stride(0), v.stride(2), k.stride(1), v.stride(1),
            K_PER=num_heads // k.shape[2], V_PER=num_heads // v.shape[2],
            DK=num_keys, DV=num_values, BK=cut.keys, BV=cut.values, C=self.chunk,
            DECAY=self.decay, REVERSE=reverse, IS_PACKED=layout.is_packed,
            num_warps=cut.num_warps, num_stages=cut.num_stages,
        )  # fmt: skip
        return states, totals

    def states_between(
        self, local: Local | None, initial: Tensor | None, k: Tensor, v: Tensor, *, reverse: bool = False
    ) -> tuple[Tensor | None, Tensor]:
        """What S is at the start of every segment, ``[S, H, K, V]`` or nothing, and room for its final values.

        ``local`` is overwritten. Backward in time, ``initial`` is the gradient of the final memory, starts are ends.
        """
        layout, num_heads = self.layout, self.num_heads
        num_keys, num_values = k.shape[-1], v.shape[-1]
        shape = layout.num_documents, num_heads, num_keys, num_values
        final = torch.empty(shape, dtype=torch.float32, device=v.device)
        if local is None:
            return initial, final
        states, totals = local
        size, block = num_keys * num_values, 1024
        diag_carry_kernel[(layout.num_documents * num_heads * cdiv(size, block),)](
            states, totals, final if initial is None else initial, final,
            layout.first_segment, layout.segments_per_row, num_heads,
            SIZE=size, BLOCK=block, DECAY=self.decay, REVERSE=reverse, IS_PACKED=layout.is_packed,
            HAS_INITIAL=initial is not None, num_warps=4,
        )  # fmt: skip
        return states, final

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        before: Tensor | None,
        *,
        is_transposed: bool = False,
        reverse: bool = False,
        final: Tensor | None = None,
        x: Tensor | None = None,
        parts: _Parts | None = None,
        saved: Tensor | None = None,
        saves: bool = False,
    ) -> None:
        """Fill ``o`` (and ``final``, ``saved``, ``parts``): one row of the table in diag_scan.py."""
        layout, num_heads = self.layout, self.num_heads
        num_keys, num_values = k.shape[-1], v.shape[-1]
        role = WITHOUT_GRADIENT if parts is None else WRITES if reverse else READS
        cut = configs.scan_blocks(num_keys, num_values, v.dtype, self.decay, role)
        stores_final = final is not None and not layout.is_split
        x = v if x is None else x
        grid = (layout.num_segments * num_heads * cdiv(num_values, cut.values),)
        diag_scan_kernel[grid](
            q, k, v, o, x, self.log_decay, self.sums, layout.plan,
            v if before is None else before,
            final if stores_final else v,
            v if saved is None else saved,
            v if parts is None else parts.write if reverse else parts.read,
            v if parts is None else parts.through,
            *self._sizes(), self._num_groups(), layout.num_all, self.scale,
            *(n for y in (q, k, v, o, x) for n in (y.stride(0), y.stride(2))),
            *(y.stride(1) for y in (q, k, v, o, x)),
            Q_PER=num_heads // q.shape[2], K_PER=num_heads // k.shape[2], V_PER=num_heads // v.shape[2],
            DK=num_keys, DV=num_values, BK=cut.keys, BV=cut.values, C=self.chunk,
            S_K=1 if is_transposed else num_values, S_V=num_keys if is_transposed else 1,
            DECAY=self.decay, REVERSE=reverse, GRADIENT=role, EVERY=self._every(),
            HAS_BEFORE=before is not None, STORE_FINAL=stores_final, STORE_SAVED=saves,
            IS_PACKED=layout.is_packed, num_warps=cut.num_warps, num_stages=cut.num_stages,
        )  # fmt: skip

    def decay_gradient(self, parts: _Parts) -> Tensor:
        """``[B, T, H]`` or ``[H]``, float32."""
        layout, groups, num_heads = self.layout, self._groups(), self.num_heads
        if self.decay == TOKEN_DECAY:
            shape = layout.num_rows, layout.num_tokens, num_heads
        else:
            shape = layout.num_segments, groups, num_heads
        grad = torch.empty(shape, dtype=torch.float32, device=parts.read.device)
        reads, writes = parts.read.shape[0], parts.write.shape[0]
        decay_gradient_kernel[(layout.num_segments * groups, num_heads)](
            parts.read, parts.write, parts.through, grad, layout.plan,
            *self._sizes(), self._num_groups(), layout.num_all,
            C=self.chunk, EVERY=self._every(), PR=reads, PW=writes, BP=next_power_of_2(max(reads, writes)),
            G=groups, DECAY=self.decay, IS_PACKED=layout.is_packed, num_warps=1,
        )  # fmt: skip
        return grad if self.decay == TOKEN_DECAY else grad.sum((0, 1))

    def new_saved(self, k: Tensor, v: Tensor) -> Tensor:
        """``[groups of all segments, H, K, V]``, room for states in the dtype of the inputs."""
        shape = self._num_groups(), self.num_heads, k.shape[-1], v.shape[-1]
        return torch.empty(shape, dtype=v.dtype, device=v.device)

    def new_parts(self, k: Tensor, v: Tensor) -> _Parts:
        """Room for the parts of the gradient of the decay; the runs of dq and dk have columns of K."""
        layout, num_keys, num_values = self.layout, k.shape[-1], v.shape[-1]
        cuts = [
            configs.scan_blocks(num_values, num_keys, k.dtype, self.decay, role) for role in (READS, WRITES)
        ]
        reads, writes = (cdiv(num_keys, cut.values) for cut in cuts)
        new = partial(torch.empty, dtype=torch.float32, device=k.device)
        return _Parts(
            new(reads, self.num_heads, layout.num_all),
            new(writes, self.num_heads, layout.num_all),
            new(writes, self._num_groups(), self.num_heads),
        )

    def _num_groups(self) -> int:
        return self.layout.num_slots(self.chunk * self._every())

    def _groups(self) -> int:
        return cdiv(cdiv(self.layout.segment_size, self.chunk), self._every())

    def _every(self) -> int:
        return configs.SAVE_EVERY if self.decay == TOKEN_DECAY else configs.SAVE_EVERY_PER_HEAD

    def _sizes(self) -> tuple[int, ...]:
        layout = self.layout
        place = layout.segment_size, layout.segments_per_row, layout.num_documents
        return layout.num_tokens, self.num_heads, *place


def _per_head(x_BTGK: Tensor, v: Tensor) -> Tensor:
    """``[B, T, H, K]``: the gradient of shared heads, before its sum."""
    return torch.empty(*v.shape[:3], x_BTGK.shape[-1], dtype=v.dtype, device=v.device)

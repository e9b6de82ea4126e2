"""Launches of the fused delta-rule kernels: memory, grids and strides.

Letters: B batch, T tokens, Hqk query/key heads, H heads, K key dim, V value dim, N documents, S chunks of all
documents, C tokens in a chunk, L = B * T, BK and BV blocks of K and V, NK blocks of K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linear_moe.kernels.triton import configs, delta_configs
from linear_moe.kernels.triton.chunk_launch import ChunkLaunch, Scan, plan_chunks
from linear_moe.kernels.triton.decay_sums import decay_sums_kernel
from linear_moe.kernels.triton.delta_chunk import delta_solve_kernel
from linear_moe.kernels.triton.delta_gradient import delta_gradient_kernel
from linear_moe.kernels.triton.delta_levels import delta_solve_levels_kernel
from linear_moe.kernels.triton.delta_output import delta_output_kernel
from linear_moe.kernels.triton.delta_pairs import delta_pairs_kernel
from linear_moe.kernels.triton.delta_scan import delta_backward_kernel, delta_forward_kernel
from linear_moe.kernels.triton.delta_vector_gradient import delta_vector_gradient_kernel
from linear_moe.kernels.triton.delta_vector_pairs import delta_vector_pairs_kernel
from linear_moe.kernels.triton.delta_weak import delta_solve_weak_kernel, delta_vector_gradient_weak_kernel
from linear_moe.kernels.triton.diag_levels import level_sums
from linear_moe.kernels.triton.sizes import cdiv, next_power_of_2

NO_DECAY, HEAD_DECAY, TOKEN_DECAY, KEY_DECAY = 0, 1, 2, 3


@dataclass(frozen=True)
class Solved:
    """What every chunk knows without the memory."""

    inverse: Tensor
    """T - I, ``[S, H, C, C]``."""
    scores: Tensor
    """P, ``[S, H, C, C]``; without q anything, as ``q_read``."""
    q_read: Tensor
    """q; for decays per row ``[B, T, H, K]``, as it reads the memory before its chunk."""
    k_read: Tensor
    """k, the same."""
    k_write: Tensor
    """k; for decays per row as it is written to the memory after its chunk."""
    totals: Tensor
    """``[S, H, K]`` float32 for decays per row: what a chunk keeps."""
    weak: Tensor
    """``[S, H]`` int32 for decays per row, if chunks may go delta_weak.py's way: which do; else anything."""
    scores_low: Tensor | None = None
    """What the rounding of P left out, for outputs of decays per row in half precision."""

    def tensors(self) -> tuple[Tensor, ...]:
        """For ``save_for_backward``; outputs are there by then."""
        return self.inverse, self.scores, self.q_read, self.k_read, self.k_write, self.totals, self.weak


@dataclass(frozen=True)
class DeltaChunks(ChunkLaunch):
    """Everything that the kernels of one call share."""

    decay: int
    log_decay: Tensor
    sums: Tensor
    """Of scalar decays; for decays per row the table that sums them."""

    @classmethod
    def plan(
        cls, k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, scale: float
    ) -> DeltaChunks:
        """Chunks of all documents, and the sums of log decays in them."""
        chunks = plan_chunks(k, v, cu_seqlens, scale, delta_configs.forward_scan)
        common, layout, chunk, num_heads = vars(chunks), chunks.layout, chunks.chunk, chunks.num_heads
        if log_decay is None:
            return cls(**common, decay=NO_DECAY, log_decay=v, sums=v)
        if log_decay.ndim == 1:
            return cls(**common, decay=HEAD_DECAY, log_decay=log_decay.contiguous(), sums=v)
        if log_decay.ndim == 4:
            table = level_sums(chunk, False, v.dtype, v.device)
            return cls(**common, decay=KEY_DECAY, log_decay=log_decay, sums=table)
        shape = layout.num_slots(chunk), num_heads, 2, chunk
        sums = torch.empty(shape, dtype=torch.float32, device=v.device)
        heads = min(16, next_power_of_2(num_heads))
        decay_sums_kernel[(layout.num_segments, cdiv(num_heads, heads))](
            log_decay, sums, layout.plan, layout.num_tokens, num_heads, chunk,
            layout.segments_per_row, layout.num_documents, 1, *log_decay.stride(),
            BH=heads, C=chunk, IS_PACKED=layout.is_packed, num_warps=2,
        )  # fmt: skip
        return cls(**common, decay=TOKEN_DECAY, log_decay=log_decay, sums=sums)

    def solve(self, q: Tensor | None, k: Tensor, beta: Tensor) -> Solved:
        """The triangular system of every chunk, and its scores, if there is a q."""
        layout, has_q = self.layout, q is not None
        shape = layout.num_segments, self.num_heads, self.chunk, self.chunk
        inverse = self._empty(*shape)
        scores = self._empty(*shape) if has_q else inverse
        q = k if q is None else q
        precision = "ieee" if self.dtype == torch.float32 else "tf32x3"
        if self.decay == KEY_DECAY:
            k_read, k_write = (self._empty(*self._tokens(), self.num_keys) for _ in range(2))
            q_read = torch.empty_like(k_read) if has_q else k_read
            totals = self._empty(*shape[:2], self.num_keys, dtype=torch.float32)
            weak = self._empty(*shape[:2], dtype=torch.int32) if self._has_weak else inverse
            low = torch.empty_like(scores) if has_q and self.dtype.itemsize == 2 else None
            of_scores = scores, scores if low is None else low
            tensors = weak, layout.plan, inverse, *of_scores, q_read, k_read, k_write, totals
            sizes = *self._sizes(), layout.num_documents, self.scale
            strides = *q.stride()[:3], *k.stride()[:3], *beta.stride(), *self.log_decay.stride()
            dims = dict(
                K_PER=self._sharing(k), DK=self.num_keys, C=self.chunk, PRECISION=precision, HAS_OUTPUT=has_q,
                IS_PACKED=layout.is_packed,
            )  # fmt: skip
            if self._has_weak:
                cut, wide = delta_configs.solve_weak(self.num_keys)
                delta_solve_weak_kernel[(self._places(),)](
                    q, k, beta, self.log_decay, *tensors, *sizes, *strides, **dims, WIDE=wide,
                    LEAST=delta_configs.least_kept(self.dtype), **cut.launch,
                )  # fmt: skip
            cut = delta_configs.solve_levels(self.num_keys, self.dtype)
            delta_solve_levels_kernel[(self._places(),)](
                q, k, beta, self.log_decay, self.sums, *tensors, *sizes, *strides, **dims, LEVELS=self._levels(),
                HAS_WEAK=self._has_weak, **cut.launch,
            )  # fmt: skip
            return Solved(inverse, scores, q_read, k_read, k_write, totals, weak, low)
        cut = delta_configs.solve(self.num_keys, self.dtype)
        delta_solve_kernel[(self._places(),)](
            q, k, beta, self.log_decay, self.sums, layout.plan, inverse, scores,
            *self._sizes(), layout.num_documents, self.scale,
            *q.stride()[:3], *k.stride()[:3], *beta.stride(),
            K_PER=self._sharing(k), DK=self.num_keys, C=self.chunk, DECAY=self.decay,
            PRECISION=precision, HAS_OUTPUT=has_q, IS_PACKED=layout.is_packed, **cut.launch,
        )  # fmt: skip
        return Solved(inverse, scores, q, k, k, inverse, inverse)

    def forward(
        self,
        solved: Solved,
        v: Tensor,
        beta: Tensor,
        initial: Tensor | None,
        actions: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The memory before every chunk ``[S, H, K, V]``, e ``[L, H, V]``, the final memory, and M of pieces.

        ``actions``: of pieces, if there are several.
        """
        return self.in_pieces(self._scan_of(solved, beta), v, initial, actions)

    def actions(self, solved: Solved, v: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """What every piece of every document does to a memory: M ``[N, pieces, H, K, K]`` and N ``[.., V]``."""
        return self.of_pieces(self._scan_of(solved, beta), v)

    def _scan_of(self, solved: Solved, beta: Tensor) -> Scan:
        return lambda v, initial, states, errors: self.scan(solved, v, beta, initial, states, errors)

    def scan(
        self,
        solved: Solved,
        v: Tensor | None,
        beta: Tensor,
        initial: Tensor | None,
        states: Tensor | None,
        errors: Tensor | None,
    ) -> Tensor:
        """Memories after all documents, or pieces; with ``states`` also what else :meth:`forward` returns."""
        layout, k_read, k_write = self.layout, solved.k_read, solved.k_write
        num_values = self.num_keys if v is None else self.num_values
        documents = layout.num_documents * self.pieces
        final = self._empty(documents, self.num_heads, self.num_keys, num_values, dtype=torch.float32)
        cut = self._ahead(delta_configs.forward_scan(self.num_keys, num_values, self.dtype), num_values)
        dims = {**self._dims(), "DV": num_values}
        delta_forward_kernel[(documents * self.num_heads * cdiv(num_values, cut.values),)](
            k_read, k_write, beta if v is None else v, beta, self.log_decay, self.sums, solved.totals,
            solved.inverse, layout.plan, layout.first_segment, final if initial is None else initial, final,
            final if states is None else states, final if errors is None else errors,
            *self._sizes(), self.pieces, *k_read.stride()[:3], *k_write.stride()[:3],
            *(beta if v is None else v).stride()[:3], *beta.stride(),
            K_PER=self._sharing(k_read), **dims, HAS_INITIAL=initial is not None,
            HAS_V=v is not None, ONLY_FINAL=states is None, **cut.launch,
        )  # fmt: skip
        return final

    def output(self, solved: Solved, states: Tensor, errors: Tensor) -> Tensor:
        """o, ``[B, T, H, V]``."""
        layout, q_read, low = self.layout, solved.q_read, solved.scores_low
        o = self._empty(*self._tokens(), self.num_values)
        cut = delta_configs.output(self.num_keys, self.num_values, self.dtype)
        delta_output_kernel[(self._places() * self._blocks_of_values(cut),)](
            q_read, self.log_decay, self.sums, layout.plan, solved.scores,
            solved.scores if low is None else low, states, errors, o,
            *self._sizes(), layout.num_documents, self.scale, *q_read.stride()[:3],
            K_PER=self._sharing(q_read), **self._dims(), HAS_LOW=low is not None, **cut.launch,
        )  # fmt: skip
        return o

    def backward(
        self, solved: Solved, do: Tensor, beta: Tensor, d_final: Tensor | None, maps: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of the memory after every chunk, of v, and of the initial memory."""
        return self.back_in_pieces(
            lambda do, after, d_states, dv: self.scan_back(solved, do, beta, after, d_states, dv),
            do,
            d_final,
            maps,
        )

    def scan_back(
        self,
        solved: Solved,
        do: Tensor | None,
        beta: Tensor,
        d_final: Tensor | None,
        d_states: Tensor | None,
        dv: Tensor | None,
    ) -> Tensor:
        """Gradients of the memory before all documents, or pieces; ``None`` for do: nothing was read."""
        has_output = do is not None
        do = beta if do is None else do
        layout, q_read, k_read, k_write = self.layout, solved.q_read, solved.k_read, solved.k_write
        documents = layout.num_documents * self.pieces
        shape = documents, self.num_heads, self.num_keys, self.num_values
        d_initial = self._empty(*shape, dtype=torch.float32)
        cut = self._ahead(
            delta_configs.backward_scan(self.num_keys, self.num_values, self.dtype), self.num_values
        )
        delta_backward_kernel[(documents * self.num_heads * self._blocks_of_values(cut),)](
            q_read, k_read, k_write, do, beta, self.log_decay, self.sums, solved.totals, solved.inverse,
            solved.scores, layout.plan, layout.first_segment, d_initial if d_final is None else d_final,
            d_initial, d_initial if d_states is None else d_states, d_initial if dv is None else dv,
            *self._sizes(), self.pieces, self.scale, *q_read.stride()[:3], *k_read.stride()[:3],
            *k_write.stride()[:3], *do.stride()[:3], *beta.stride(),
            K_PER=self._sharing(k_read), **self._dims(), HAS_FINAL=d_final is not None,
            ONLY_INITIAL=d_states is None, HAS_OUTPUT=has_output, **cut.launch,
        )  # fmt: skip
        return d_initial

    def gradients(
        self,
        q: Tensor | None,
        k: Tensor,
        do: Tensor | None,
        beta: Tensor,
        solved: Solved,
        errors: Tensor,
        dv: Tensor,
        states: Tensor,
        d_states: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of q and k for every head ``[B, T, H, K]``, of beta and the decay; clears dv where no document is.

        Without q and do, the first is the second.
        """
        layout, tokens, has_output = self.layout, self._tokens(), q is not None
        dk = self._empty(*tokens, self.num_keys)
        dq = torch.empty_like(dk) if has_output else dk
        q, do = k if q is None else q, beta if do is None else do
        cut = self._gradient_blocks()
        blocks = cdiv(self.num_keys, cut.keys)
        grid = (self._places() * blocks,)
        parts = blocks + (self.decay != KEY_DECAY), *tokens
        d_beta = self._empty(*parts, dtype=torch.float32)
        strides = *q.stride()[:3], *k.stride()[:3], *do.stride()[:3], *beta.stride()
        if self.decay == KEY_DECAY:
            d_decay = self._empty(*tokens, self.num_keys, dtype=self.log_decay.dtype)
            dims = self._dims() | dict(K_PER=self._sharing(k), HAS_OUTPUT=has_output)
            del dims["DECAY"]
            pairs, own = self._vector_pairs(solved, do, errors, dv, has_output)
            tensors = (
                solved.weak, solved.totals, layout.plan, pairs, own, errors, dv, states, d_states, dq, dk, d_decay,
                d_beta, *self._sizes(), layout.num_documents, layout.num_all, self.scale, *strides,
                *self.log_decay.stride(),
            )  # fmt: skip
            delta_vector_gradient_kernel[grid](
                q, k, do, beta, self.log_decay, self.sums, *tensors,
                LEVELS=self._levels(), HAS_WEAK=self._has_weak, **dims, **cut.launch,
            )  # fmt: skip
            if self._has_weak:
                cut = delta_configs.vector_gradient_weak(self.num_keys, self.num_values)
                delta_vector_gradient_weak_kernel[(self._places() * cdiv(self.num_keys, cut.keys),)](
                    q, k, do, beta, self.log_decay, *tensors, PARTS=blocks, **dims, **cut.launch
                )
            return dq, dk, d_beta.sum(0), d_decay
        d_decay = d_beta if self.decay == NO_DECAY else self._empty(*parts, dtype=torch.float32)
        pairs = self._new_pairs()
        of_pairs = delta_configs.pairs(self.num_keys, self.num_values, self.dtype)
        delta_pairs_kernel[(self._places(),)](
            q, k, do, beta, self.log_decay, self.sums, layout.plan, errors, dv, pairs, d_beta[-1], d_decay[-1],
            *self._sizes(), layout.num_documents, self.scale, *strides,
            K_PER=self._sharing(k), HAS_OUTPUT=has_output, **self._dims(), **of_pairs.launch,
        )  # fmt: skip
        delta_gradient_kernel[grid](
            q, k, do, beta, self.log_decay, self.sums, layout.plan, pairs, errors, dv, states, d_states,
            dq, dk, d_beta, d_decay, *self._sizes(), layout.num_documents, layout.num_all, self.scale, *strides,
            K_PER=self._sharing(k), HAS_OUTPUT=has_output, **self._dims(), **cut.launch,
        )  # fmt: skip
        if self.decay == NO_DECAY:
            return dq, dk, d_beta.sum(0), None
        d_decay = d_decay.sum((0, 1, 2) if self.decay == HEAD_DECAY else 0)
        return dq, dk, d_beta.sum(0), d_decay.to(self.log_decay.dtype)

    def _vector_pairs(
        self, solved: Solved, do: Tensor, errors: Tensor, dv: Tensor, has_output: bool
    ) -> tuple[Tensor, Tensor]:
        """What tokens of a chunk give each other: ``[S, H, 2, C, C]`` and, float32, ``[S, H, C]``."""
        layout, pairs = self.layout, self._new_pairs()
        own = self._empty(layout.num_segments, self.num_heads, self.chunk, dtype=torch.float32)
        cut = delta_configs.vector_pairs(self.num_values, self.dtype)
        delta_vector_pairs_kernel[(self._places(),)](
            do, errors, dv, solved.weak, layout.plan, pairs, own, *self._sizes(), layout.num_documents, self.scale,
            *do.stride()[:3], DV=self.num_values, BV=cut.values, C=self.chunk, HAS_WEAK=self._has_weak,
            HAS_OUTPUT=has_output, IS_PACKED=layout.is_packed,
            num_warps=cut.num_warps, num_stages=cut.num_stages,
        )  # fmt: skip
        return pairs, own

    @property
    def _has_weak(self) -> bool:
        """Whether chunks may go delta_weak.py's way."""
        return delta_configs.least_kept(self.dtype) <= 0

    def _ahead(self, scan: delta_configs.Cut, num_values: int) -> delta_configs.Cut:
        """A scan's blocks; pieces of rows are many, and of documents most may be short."""
        rows, _ = configs.deciding(self.layout.num_rows, self.layout.num_tokens)
        programs = rows * self.num_heads * cdiv(num_values, scan.values)
        is_long = 2 * programs <= configs.num_processors(self.device)
        return delta_configs.ahead(scan, is_long and self.pieces == 1 and not self.layout.is_packed)

    def _new_pairs(self) -> Tensor:
        return self._empty(self.layout.num_segments, self.num_heads, 2, self.chunk, self.chunk)

    def _gradient_blocks(self) -> delta_configs.Cut:
        blocks = delta_configs.vector_gradient if self.decay == KEY_DECAY else delta_configs.gradient
        return blocks(self.num_keys, self.num_values, self.dtype)

    def _blocks_of_values(self, cut: delta_configs.Cut) -> int:
        return cdiv(self.num_values, cut.values)

    def _sizes(self) -> tuple[int, int, int]:
        layout = self.layout
        return layout.num_tokens, self.num_heads, layout.segments_per_row

    def _dims(self) -> dict[str, Any]:
        """What most kernels are compiled for."""
        sizes = dict(DK=self.num_keys, DV=self.num_values, C=self.chunk)
        return dict(**sizes, DECAY=self.decay, IS_PACKED=self.layout.is_packed)

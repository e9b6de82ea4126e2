"""Launches of the fused kernels of a diagonal plus low-rank memory: memory, grids and strides.

Letters: B batch, T tokens, Hqk query/key heads, H heads, K key dim, V value dim, N documents, S chunks of all
documents, C tokens in a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linear_moe.kernels.triton import dplr_configs
from linear_moe.kernels.triton.chunk_launch import ChunkLaunch, plan_chunks
from linear_moe.kernels.triton.diag_levels import level_sums
from linear_moe.kernels.triton.dplr_chunk import dplr_solve_kernel
from linear_moe.kernels.triton.dplr_gradient import dplr_gradient_kernel, dplr_pairs_kernel
from linear_moe.kernels.triton.dplr_scan import dplr_read_kernel, dplr_scan_kernel
from linear_moe.kernels.triton.dplr_weak import dplr_gradient_weak_kernel, dplr_solve_weak_kernel
from linear_moe.kernels.triton.sizes import cdiv


@dataclass(frozen=True)
class Solved:
    """What every chunk knows without the memory: matrices ``[S, H, C, C]``, rows ``[B, T, H, K]``."""

    inverse: Tensor
    """T - I."""
    scores_ak: Tensor
    scores_qb: Tensor
    """Without q anything, as ``scores_qk`` and ``q_read``."""
    scores_qk: Tensor
    q_read: Tensor
    """q as it reads the memory before its chunk, scale in it."""
    a_read: Tensor
    b_write: Tensor
    """b as it is written to the memory after its chunk."""
    k_write: Tensor
    totals: Tensor
    """``[S, H, K]`` float32: what a chunk keeps."""

    def tensors(self) -> tuple[Tensor, ...]:
        """For ``save_for_backward``."""
        matrices = self.inverse, self.scores_ak, self.scores_qb, self.scores_qk
        return *matrices, self.q_read, self.a_read, self.b_write, self.k_write, self.totals


def per_row(log_decay: Tensor | None, k: Tensor, v: Tensor) -> Tensor:
    """``[B, T, H, K]``, expanded: no decay, and decays that rows share, are those of single rows.

    Wide before the expansion, since the gradient is a sum over what shares it, rounded once.
    """
    shape = *v.shape[:3], k.shape[-1]
    if log_decay is None:
        return torch.zeros((), dtype=torch.float32, device=v.device).expand(shape)
    return log_decay if log_decay.ndim == 4 else log_decay.float().unsqueeze(-1).expand(shape)


@dataclass(frozen=True)
class DplrChunks(ChunkLaunch):
    """Everything that the kernels of one call share."""

    table: Tensor
    """Sums log decays."""

    @classmethod
    def plan(cls, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, scale: float) -> DplrChunks:
        """Chunks of all documents."""
        chunks = plan_chunks(k, v, cu_seqlens, scale, dplr_configs.scan)
        return cls(**vars(chunks), table=level_sums(chunks.chunk, True, v.dtype, v.device))

    def solve(self, q: Tensor | None, k: Tensor, a: Tensor, b: Tensor, log_decay: Tensor) -> Solved:
        """The triangular system of every chunk, and its scores, those of q if there is one."""
        layout, has_q = self.layout, q is not None
        inverse = self._empty(layout.num_segments, self.num_heads, self.chunk, self.chunk)
        scores_ak = torch.empty_like(inverse)
        scores_qb, scores_qk = (torch.empty_like(inverse) if has_q else inverse for _ in range(2))
        a_read, b_write, k_write = (self._empty(*self._tokens(), self.num_keys) for _ in range(3))
        q_read = torch.empty_like(a_read) if has_q else a_read
        totals = self._empty(layout.num_segments, self.num_heads, self.num_keys, dtype=torch.float32)
        q = k if q is None else q
        least = dplr_configs.least_kept(self.dtype)
        ways = [(dplr_solve_kernel, dplr_configs.solve(self.num_keys, self.dtype))]
        if least < 1:
            ways.insert(0, (dplr_solve_weak_kernel, dplr_configs.solve_weak(self.num_keys, self.dtype)))
        for kernel, cut in ways:  # the first says which chunks it leaves to the second
            kernel[(self._places(),)](
                q, k, a, b, log_decay, self.table, layout.plan, inverse, scores_ak, scores_qb, scores_qk,
                q_read, a_read, b_write, k_write, totals, *self._sizes(), layout.num_documents, self.scale,
                *self._strides(q, k, a, b), *log_decay.stride(),
                K_PER=self._sharing(k), DK=self.num_keys, C=self.chunk, LEVELS=self._levels(), LEAST=least,
                PRECISION="ieee" if self.dtype == torch.float32 else "tf32x3", HAS_OUTPUT=has_q,
                IS_PACKED=layout.is_packed, **cut.launch,
            )  # fmt: skip
        return Solved(inverse, scores_ak, scores_qb, scores_qk, q_read, a_read, b_write, k_write, totals)

    def forward(
        self, solved: Solved, v: Tensor, initial: Tensor | None, actions: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The memory before every chunk ``[S, H, K, V]``, w ``[B, T, H, V]``, the final memory, and M of pieces.

        ``actions`` of the pieces, where there are several.
        """
        return self.in_pieces(partial(self.scan, solved), v, initial, actions)

    def backward(
        self, solved: Solved, do: Tensor, d_final: Tensor | None, maps: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of the memory after every chunk, of w before the chunk is solved, of the initial memory."""
        return self.back_in_pieces(partial(self.scan, solved, reverse=True), do, d_final, maps)

    def actions(self, solved: Solved, v: Tensor) -> tuple[Tensor, Tensor]:
        """What every piece of every document does to a memory: M ``[N, pieces, H, K, K]`` and N ``[.., V]``."""
        return self.of_pieces(partial(self.scan, solved), v)

    def scan(
        self,
        solved: Solved,
        x: Tensor | None,
        initial: Tensor | None,
        states: Tensor | None,
        w: Tensor | None,
        *,
        reverse: bool = False,
    ) -> Tensor:
        """Memories after all documents, or pieces, of v; ``reverse`` their gradients before them, of do.

        Fills ``states`` and ``w``, if given. Without x nothing is written, and forward the memory is K x K.
        """
        layout = self.layout
        num_values = self.num_keys if x is None and not reverse else self.num_values
        documents = layout.num_documents * self.pieces
        final = self._empty(documents, self.num_heads, self.num_keys, num_values, dtype=torch.float32)
        rows = (solved.a_read, solved.b_write, solved.k_write)
        if reverse:
            rows = (solved.b_write, solved.a_read, solved.q_read)
        cut = dplr_configs.scan(self.num_keys, num_values, self.dtype)
        dplr_scan_kernel[(documents * self.num_heads * cdiv(num_values, cut.values),)](
            *rows, final if x is None else x, solved.scores_qb if reverse else solved.scores_ak,
            solved.inverse, solved.totals, layout.plan, layout.first_segment,
            final if initial is None else initial, final, final if states is None else states,
            final if w is None else w, *self._sizes(), self.pieces, *(final if x is None else x).stride()[:3],
            DK=self.num_keys, DV=num_values, C=self.chunk, HAS_INITIAL=initial is not None,
            HAS_X=x is not None, ONLY_FINAL=states is None, REVERSE=reverse, IS_PACKED=layout.is_packed,
            **cut.launch,
        )  # fmt: skip
        return final

    def read(
        self, solved: Solved, x: Tensor | None, states: Tensor, w: Tensor, *, reverse: bool = False
    ) -> Tensor:
        """o of v, ``[B, T, H, V]``; ``reverse`` dv of do, ``None`` if there was none."""
        layout, o = self.layout, self.new_values()
        cut = dplr_configs.read(self.num_keys, self.num_values, self.dtype)
        dplr_read_kernel[(self._places() * cdiv(self.num_values, cut.values),)](
            solved.k_write if reverse else solved.q_read, solved.scores_ak if reverse else solved.scores_qb,
            solved.scores_qk, states, w, w if x is None else x, layout.plan, o,
            *self._sizes(), layout.num_documents, *(w if x is None else x).stride()[:3],
            DK=self.num_keys, DV=self.num_values, C=self.chunk, HAS_X=x is not None, REVERSE=reverse,
            IS_PACKED=layout.is_packed, **cut.launch,
        )  # fmt: skip
        return o

    def gradients(
        self,
        tokens: tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor],
        solved: Solved,
        v: Tensor | None,
        do: Tensor | None,
        memory: tuple[Tensor, Tensor, Tensor, Tensor],
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor]:
        """Of q, k, a, b and log_decay, the ``tokens``, for every head ``[B, T, H, K]``, from w, z, S and dS.

        Without q and do none of q, without v none of k.
        """
        q, k, a, b, log_decay = tokens
        w, z, states, d_states = memory
        layout, like = self.layout, (k if q is None else q, k, a, b, log_decay)
        grads = [self._empty(*self._tokens(), self.num_keys, dtype=x.dtype) for x in like[1:]]
        dq = torch.empty_like(grads[0]) if q is not None else None
        pairs = self._pairs(w if v is None else v, do, w, z, solved.totals, has_v=v is not None)
        dims, least = (self.num_keys, self.num_values, self.dtype), dplr_configs.least_kept(self.dtype)
        ways = [(dplr_gradient_kernel, dplr_configs.gradient(*dims))]
        if least < 1:
            ways.append((dplr_gradient_weak_kernel, dplr_configs.gradient_weak(*dims)))
        for kernel, cut in ways:  # each for chunks of its own
            kernel[(self._places() * cdiv(self.num_keys, cut.keys),)](
                *like, self.table, solved.totals, layout.plan, w if v is None else v, w if do is None else do,
                w, z, states, d_states, pairs, grads[0] if dq is None else dq, *grads,
                *self._sizes(), layout.num_documents, self.scale, *self._strides(*like[:4]), *log_decay.stride(),
                *self._strides(w if v is None else v, w if do is None else do),
                K_PER=self._sharing(k), DK=self.num_keys, DV=self.num_values, C=self.chunk,
                LEVELS=self._levels(), LEAST=least, HAS_OUTPUT=q is not None, HAS_V=v is not None,
                IS_PACKED=layout.is_packed, **cut.launch,
            )  # fmt: skip
        return dq, None if v is None else grads[0], grads[1], grads[2], grads[3]

    def _pairs(
        self, v: Tensor, do: Tensor | None, w: Tensor, z: Tensor, totals: Tensor, *, has_v: bool
    ) -> Tensor:
        """What the scores' gradients are before any decay, ``[S, H, 4, C, C]``."""
        layout, of_output = self.layout, w if do is None else do
        pairs = self._empty(layout.num_segments, self.num_heads, 4, self.chunk, self.chunk)
        cut = dplr_configs.pairs(self.num_values, self.dtype)
        dplr_pairs_kernel[(self._places(),)](
            v, of_output, w, z, totals, layout.plan, pairs, *self._sizes(), layout.num_documents, self.scale,
            *self._strides(v, of_output), DK=self.num_keys, DV=self.num_values, C=self.chunk,
            LEAST=dplr_configs.least_kept(self.dtype),
            HAS_OUTPUT=do is not None, HAS_V=has_v, IS_PACKED=layout.is_packed,
            BV=cut.values, num_warps=cut.num_warps, num_stages=cut.num_stages,
        )  # fmt: skip
        return pairs

    def _sizes(self) -> tuple[int, int, int]:
        return self.layout.num_tokens, self.num_heads, self.layout.segments_per_row

    def _strides(self, *tensors: Tensor) -> list[Any]:
        return [stride for x in tensors for stride in x.stride()[:3]]

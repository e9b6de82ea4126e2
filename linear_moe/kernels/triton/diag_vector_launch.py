"""Launches of the fused scan of a memory whose rows or columns decay: memory, grids and strides.

Letters: B batch, T tokens, H heads, K key dim, V value dim, D the dim that decays, S segments, M chunks, G groups of
chunks, C tokens in a chunk, L = B * T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linear_moe.kernels.triton import configs
from linear_moe.kernels.triton.diag_combine import diag_combine_kernel
from linear_moe.kernels.triton.diag_levels import level_sums
from linear_moe.kernels.triton.diag_scale import diag_scale_kernel
from linear_moe.kernels.triton.diag_vector_scan import diag_scaled_scan_kernel
from linear_moe.kernels.triton.layout import Layout, lay_out
from linear_moe.kernels.triton.sizes import cdiv
from linear_moe.kernels.triton.states import Local, diag_carry_kernel


@dataclass(frozen=True)
class Scaled:
    """What diag_scale.py makes of x and y."""

    x: Tensor | None
    """``[B, T, H, D]``, with the decay since the chunk's start and the scale of the output."""
    y: Tensor
    """``[B, T, H, D]``, with the decay up to the chunk's end."""
    pairs: Tensor | None
    """``[L, H, C]``."""
    totals: Tensor
    """``[M, H, D]``, log2."""

    def tensors(self) -> tuple[Tensor | None, ...]:
        """For ``save_for_backward``."""
        return self.x, self.y, self.pairs, self.totals


@dataclass(frozen=True)
class VectorScan:
    """Everything that the kernels of one call share; x, y, z, e as in the docstring of diag_vector_scan.py."""

    layout: Layout
    log_decay: Tensor
    bonus: Tensor | None
    scale: float
    memory: tuple[int, int, int]
    """H, K, V."""
    chunk: int
    every: int
    decays_rows: bool

    @classmethod
    def plan(
        cls,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        bonus: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        *,
        decays_rows: bool,
    ) -> VectorScan:
        """Cut the rows, or the packed documents, into segments."""
        rows, num_tokens, num_heads, num_values = v.shape
        chunk = configs.diag_chunk_size(v.dtype)
        blocks = cdiv(num_values, configs.scaled_scan_blocks(k.shape[-1], num_values, v.dtype).values)
        processors = configs.num_processors(v.device)
        size = configs.segment_size(rows, num_tokens, num_heads, blocks, chunk, processors)
        layout = lay_out(rows, num_tokens, size, cu_seqlens, like=v)
        every = (
            configs.SAVE_EVERY_PER_ELEMENT if bonus is None else 1
        )  # a token reads before it decays: a sum would cancel
        memory = num_heads, k.shape[-1], num_values
        return cls(layout, log_decay, bonus, scale, memory, chunk, every, decays_rows)

    @property
    def width(self) -> int:
        """D."""
        return self.memory[1 if self.decays_rows else 2]

    def scaled(self, x: Tensor | None, y: Tensor) -> Scaled:
        """Everything that needs an exponential, chunk by chunk."""
        layout, chunk = self.layout, self.chunk
        scaled_x = None if x is None else self._per_head(y)
        scaled_y = self._per_head(y)
        pairs = None if x is None else self._new_pairs(y)
        num_chunks = layout.num_slots(chunk)
        totals = torch.empty(num_chunks, self.memory[0], self.width, dtype=torch.float32, device=y.device)
        x = y if x is None else x
        per_segment = cdiv(layout.segment_size, chunk)
        a = self.log_decay
        cut = configs.scale_blocks(self.width, y.dtype)
        diag_scale_kernel[(layout.num_segments * per_segment, self.memory[0])](
            x, y, a, y if self.bonus is None else self.bonus,
            y if scaled_x is None else scaled_x, scaled_y, y if pairs is None else pairs, totals,
            self._sums(y), layout.plan,
            layout.num_tokens, *self._sizes(), per_segment, self.scale,
            *(n for z in (x, y, a) for n in (z.stride(0), z.stride(2))),
            *(z.stride(1) for z in (x, y, a)), a.stride(3),
            X_PER=self._sharing(x), Y_PER=self._sharing(y), D=self.width, BD=cut.columns, C=chunk,
            LEVELS=chunk.bit_length() - 1, LEAST=self._least(y),
            HAS_X=scaled_x is not None, HAS_BONUS=self.bonus is not None,
            IS_PACKED=layout.is_packed, num_warps=cut.num_warps, num_stages=cut.num_stages,
        )  # fmt: skip
        return Scaled(scaled_x, scaled_y, pairs, totals)

    def local_states(self, k: Tensor, v: Tensor, totals: Tensor, *, reverse: bool = False) -> Local | None:
        """What every segment leaves in an empty memory, and what it keeps of another; ``None`` if none is cut.

        One of ``k`` and ``v`` is scaled; backward in time they are q and the gradient of o.
        """
        layout = self.layout
        if not layout.is_split:
            return None
        states = torch.empty(layout.num_segments, *self.memory, dtype=torch.float32, device=v.device)
        kept_shape = layout.num_segments, self.memory[0], self.width
        kept = torch.empty(kept_shape, dtype=torch.float32, device=v.device)
        self._run(
            k, k, v, None, None, totals, rows=self.decays_rows, reverse=reverse, final=states, kept=kept
        )  # fmt: skip
        return states, kept

    def states_between(
        self, local: Local | None, initial: Tensor | None, *, reverse: bool = False
    ) -> tuple[Tensor | None, Tensor]:
        """The memory at the start of every segment, ``[S, H, K, V]`` or nothing, and room for its final values.

        ``local`` is overwritten. Backward in time, ``initial`` is the gradient of the final memory, starts are ends.
        """
        layout, device = self.layout, self.log_decay.device
        num_heads, num_keys, num_values = self.memory
        initial = None if initial is None else initial.float().contiguous()
        final = torch.empty(layout.num_documents, *self.memory, dtype=torch.float32, device=device)
        if local is None:
            return initial, final
        states, kept = local
        size, block = num_keys * num_values, 1024
        diag_carry_kernel[(layout.num_documents * num_heads * cdiv(size, block),)](
            states, kept, final if initial is None else initial, final,
            layout.first_segment, layout.segments_per_row, num_heads,
            SIZE=size, BLOCK=block, DECAY=1, REVERSE=reverse, IS_PACKED=layout.is_packed,
            HAS_INITIAL=initial is not None, KEPT=self.width, SPAN=num_values if self.decays_rows else 1,
            num_warps=4,
        )  # fmt: skip
        return states, final

    def rows(
        self, scaled: Scaled, z: Tensor, before: Tensor | None, final: Tensor | None, saved: Tensor | None
    ) -> Tensor:
        """``[B, T, H, Z]``: what x reads of the z written under y."""
        assert scaled.x is not None
        o = self._per_head(z)
        self._run(
            scaled.x, scaled.y, z, o, scaled.pairs, scaled.totals,
            rows=True, before=before, final=self._unless_split(final), saved=saved,
        )  # fmt: skip
        return o

    def rows_back(self, scaled: Scaled, e: Tensor, after: Tensor | None, final: Tensor) -> Tensor:
        """``[B, T, H, Z]``: the gradient of z, from e, the gradient of what :meth:`rows` gives."""
        assert scaled.x is not None
        o = self._per_head(e)
        self._run(
            scaled.y, scaled.x, e, o, scaled.pairs, scaled.totals,
            rows=True, reverse=True, before=after, final=self._unless_split(final),
        )  # fmt: skip
        return o

    def columns(
        self, scaled: Scaled, e: Tensor, z: Tensor, before: Tensor | None, final: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``[B, T, H, D]``, the gradient of the scaled x, and of the pairs, ``[L, H, C]``, over the scale."""
        o, pairs = self._per_head(scaled.y), self._new_pairs(e)
        self._run(
            e, z, scaled.y, o, pairs, scaled.totals,
            rows=False, before=before, final=self._unless_split(final),
        )  # fmt: skip
        return o, pairs

    def columns_back(
        self, scaled: Scaled, e: Tensor, z: Tensor, after: Tensor | None, saved: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, T, H, D]``, the gradient of the scaled y, and ``through``, ``[G, H, D]``, where it is wanted."""
        assert scaled.x is not None
        o, through = self._per_head(scaled.y), None
        if saved is not None:
            shape = saved.shape[0], self.memory[0], self.width
            through = torch.empty(shape, dtype=torch.float32, device=e.device)
        self._run(
            z, e, scaled.x, o, None, scaled.totals,
            rows=False, reverse=True, before=after, saved=saved, through=through,
        )  # fmt: skip
        return o, through

    def combine_forward(self, y: Tensor, pairs: Tensor, scaled_dx: Tensor, totals: Tensor) -> Tensor:
        """``[B, T, H, D]``, dx alone."""
        dx = self._per_head(y)
        self._combine(y, y, pairs, scaled_dx, y, None, totals, dx, None, None, None)
        return dx

    def combine(
        self,
        x: Tensor,
        y: Tensor,
        pairs: Tensor,
        scaled_dx: Tensor,
        scaled_dy: Tensor,
        through: Tensor | None,
        totals: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Gradients of x and y for every head, of the log decay and of the bonus."""
        layout, num_heads = self.layout, self.memory[0]
        dx, dy = self._per_head(x), self._per_head(y)
        d_log: Tensor | None = None
        if through is not None:
            d_log = torch.empty(dx.shape, dtype=torch.float32, device=x.device)
        d_bonus: Tensor | None = None
        if self.bonus is not None:
            groups = layout.num_slots(self.chunk * self.every)
            d_bonus = torch.zeros(groups, num_heads, self.width, dtype=torch.float32, device=x.device)
        self._combine(x, y, pairs, scaled_dx, scaled_dy, through, totals, dx, dy, d_log, d_bonus)
        return dx, dy, d_log, None if d_bonus is None else d_bonus.sum(0)

    def new_saved(self, like: Tensor) -> Tensor:
        """``[G, H, K, V]``, room for memories in the dtype of the inputs."""
        groups = self.layout.num_slots(self.chunk * self.every)
        return torch.empty(groups, *self.memory, dtype=like.dtype, device=like.device)

    def _run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor | None,
        pairs: Tensor | None,
        totals: Tensor,
        *,
        rows: bool,
        reverse: bool = False,
        before: Tensor | None = None,
        final: Tensor | None = None,
        kept: Tensor | None = None,
        saved: Tensor | None = None,
        through: Tensor | None = None,
    ) -> None:
        """One row of the table in diag_vector_scan.py; without ``o``, what segments leave in an empty memory."""
        layout, num_heads = self.layout, self.memory[0]
        num_keys, num_values = k.shape[-1], v.shape[-1]
        cut = configs.scaled_scan_blocks(num_keys, num_values, v.dtype)
        out = v if o is None else o
        is_transposed = rows != self.decays_rows
        grid = (layout.num_segments * num_heads * cdiv(num_values, cut.values),)
        diag_scaled_scan_kernel[grid](
            q, k, v, out, *(v if x is None else x for x in (pairs, totals, kept)), layout.plan,
            *(v if x is None else x for x in (before, final, saved, through)), layout.num_tokens, *self._sizes(),
            *(n for y in (q, k, v, out) for n in (y.stride(0), y.stride(2))),
            *(y.stride(1) for y in (q, k, v, out)),
            Q_PER=self._sharing(q), K_PER=self._sharing(k), V_PER=self._sharing(v),
            DK=num_keys, DV=num_values, BK=cut.keys, BV=cut.values, C=self.chunk,
            S_K=1 if is_transposed else num_values, S_V=num_keys if is_transposed else 1,
            ROWS=rows, REVERSE=reverse, HAS_OUTPUT=o is not None, EVERY=self.every,
            HAS_BEFORE=before is not None, STORE_FINAL=final is not None,
            STORE_SAVED=saved is not None and through is None, STORE_THROUGH=through is not None,
            IS_PACKED=layout.is_packed, num_warps=cut.num_warps, num_stages=cut.num_stages,
        )  # fmt: skip

    def _combine(
        self,
        x: Tensor,
        y: Tensor,
        pairs: Tensor,
        scaled_dx: Tensor,
        scaled_dy: Tensor,
        through: Tensor | None,
        totals: Tensor,
        dx: Tensor,
        dy: Tensor | None,
        d_log: Tensor | None,
        d_bonus: Tensor | None,
    ) -> None:
        layout, chunk = self.layout, self.chunk
        groups = cdiv(cdiv(layout.segment_size, chunk), self.every)
        a = self.log_decay
        cut = configs.combine_blocks(self.width, y.dtype, self._least(y) < 0)
        grid = layout.num_segments * groups, self.memory[0], cdiv(self.width, cut.columns)
        diag_combine_kernel[grid](
            x, y, a, y if self.bonus is None else self.bonus, pairs, scaled_dx, scaled_dy,
            y if through is None else through, totals, dx, y if dy is None else dy, y if d_log is None else d_log,
            y if d_bonus is None else d_bonus, self._sums(y), layout.plan,
            layout.num_tokens, *self._sizes(), groups, self.scale,
            *(n for z in (x, y, a) for n in (z.stride(0), z.stride(2))),
            *(z.stride(1) for z in (x, y, a)), a.stride(3),
            X_PER=self._sharing(x), Y_PER=self._sharing(y), D=self.width, BD=cut.columns, PART=cut.part,
            C=chunk, LEVELS=chunk.bit_length() - 1, LEAST=self._least(y), EVERY=self.every, FORWARD=dy is None,
            HAS_DECAY_GRADIENT=d_log is not None, HAS_BONUS=self.bonus is not None,
            IS_PACKED=layout.is_packed, num_warps=cut.num_warps, num_stages=cut.num_stages,
        )  # fmt: skip

    def _sizes(self) -> tuple[int, ...]:
        layout = self.layout
        return self.memory[0], layout.segment_size, layout.segments_per_row, layout.num_documents

    def _sums(self, like: Tensor) -> Tensor:
        return level_sums(self.chunk, self.bonus is not None, like.dtype, like.device)

    def _least(self, like: Tensor) -> float:
        """Of what a chunk keeps of a column, log2, for the way of diag_weak.py."""
        return configs.least_total(self.width, like.dtype, self.bonus is not None)

    def _sharing(self, x: Tensor) -> int:
        return self.memory[0] // x.shape[2]

    def _per_head(self, like: Tensor) -> Tensor:
        """``[B, T, H, D]`` of the width of ``like``."""
        shape = self.layout.num_rows, self.layout.num_tokens, self.memory[0], like.shape[-1]
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    def _new_pairs(self, like: Tensor) -> Tensor:
        shape = self.layout.num_all, self.memory[0], self.chunk
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    def _unless_split(self, final: Tensor | None) -> Tensor | None:
        """Split, the carry between segments has already filled it."""
        return None if self.layout.is_split else final

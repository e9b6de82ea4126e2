"""Fused delta rule, forward and backward, for decays that are none, per head, or per token and head.

    S' = a_t * S_{t-1},    S_t = S' + beta_t k_t (v_t - S'^T k_t)^T,    o_t = scale * S_t^T q_t

Five kernels: delta_chunk.py solves every chunk by itself, delta_scan.py carries the memory from chunk to chunk,
delta_output.py reads it; backward, delta_scan.py carries its gradient and delta_gradient.py does the rest. Between
forward and backward stay the inputs, the memory before every chunk, T, P and e. Nothing is atomic and nothing waits for
the device. docs/kernels_delta.md has the derivation and the bytes.

Letters: B batch, T tokens, Hqk query/key heads, H heads, K key dim, V value dim, N documents, S chunks of all
documents, C tokens in a chunk, L = B * T, BK and BV blocks of K and V, NK blocks of K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.kernels.triton import configs, delta_configs
from linear_moe.kernels.triton.decay_sums import sums_kernel
from linear_moe.kernels.triton.delta_chunk import solve_kernel
from linear_moe.kernels.triton.delta_gradient import gradient_kernel
from linear_moe.kernels.triton.delta_output import output_kernel
from linear_moe.kernels.triton.delta_scan import backward_kernel, forward_kernel
from linear_moe.kernels.triton.layout import Layout, lay_out, of_groups, rows_together

NO_DECAY, HEAD_DECAY, TOKEN_DECAY, KEY_DECAY = 0, 1, 2, 3


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`linear_moe.kernels.delta_rule`; float32, float16 and bfloat16, ``log_decay`` up to ``[B, T, H]``."""
    return _DeltaRule.apply(q, k, v, beta, log_decay, state, cu_seqlens, float(scale))


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
    ) -> tuple[Tensor, Tensor]:
        q, k, v = rows_together(q), rows_together(k), rows_together(v)
        chunks = DeltaChunks.plan(k, v, log_decay, cu_seqlens, scale)
        inverse, scores = chunks.solve(q, k, beta)
        initial = None if state is None else state.float().contiguous()
        states, errors, final = chunks.forward(k, v, beta, inverse, initial)
        o = chunks.output(q, scores, states, errors)

        ctx.chunks = chunks
        ctx.dtypes = [None if x is None else x.dtype for x in (beta, log_decay, state)]
        ctx.save_for_backward(q, k, v, beta, inverse, scores, states, errors)
        ctx.set_materialize_grads(False)
        return o, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, d_final: Tensor | None) -> tuple[Any, ...]:
        q, k, v, beta, inverse, scores, states, errors = ctx.saved_tensors
        chunks: DeltaChunks = ctx.chunks
        do = torch.zeros_like(v) if do is None else rows_together(do)
        d_final = None if d_final is None else d_final.contiguous()
        d_states, dv, d_initial = chunks.backward(q, k, do, beta, inverse, scores, d_final)
        dq, dk, d_beta, d_decay = chunks.gradients(q, k, do, beta, errors, dv, states, d_states)

        of_beta, of_decay, of_state = ctx.dtypes
        return (
            of_groups(dq, q),
            of_groups(dk, k),
            dv,
            d_beta.to(of_beta),
            None if d_decay is None else d_decay.to(of_decay),
            None if of_state is None else d_initial.to(of_state),
            None,
            None,
        )


@dataclass(frozen=True)
class DeltaChunks:
    """Everything that the kernels of one call share."""

    layout: Layout
    """Its segments are chunks."""
    num_heads: int
    num_keys: int
    num_values: int
    dtype: torch.dtype
    scale: float
    chunk: int
    decay: int
    log_decay: Tensor
    sums: Tensor

    @classmethod
    def plan(
        cls, k: Tensor, v: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None, scale: float
    ) -> DeltaChunks:
        """Chunks of all documents, and the sums of log decays in them."""
        rows, num_tokens, num_heads, num_values = v.shape
        chunk = configs.chunk_size(v.dtype)
        layout = lay_out(rows, num_tokens, chunk, cu_seqlens, like=v)
        common = layout, num_heads, k.shape[-1], num_values, v.dtype, scale, chunk
        if log_decay is None:
            return cls(*common, NO_DECAY, v, v)
        if log_decay.ndim == 1:
            return cls(*common, HEAD_DECAY, log_decay.contiguous(), v)
        sums = torch.empty(2, num_heads, layout.num_all, dtype=torch.float32, device=v.device)
        heads = min(16, triton.next_power_of_2(num_heads))
        sums_kernel[(layout.num_segments, triton.cdiv(num_heads, heads))](
            log_decay, sums, layout.plan, num_tokens, layout.num_all, num_heads, chunk,
            layout.segments_per_row, layout.num_documents, 1, *log_decay.stride(),
            BH=heads, C=chunk, IS_PACKED=layout.is_packed, num_warps=2,
        )  # fmt: skip
        return cls(*common, TOKEN_DECAY, log_decay, sums)

    def solve(self, q: Tensor, k: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        """T - I and P of delta_chunk.py, ``[S, H, C, C]`` each."""
        shape = self.layout.num_segments, self.num_heads, self.chunk, self.chunk
        inverse, scores = self._empty(*shape), self._empty(*shape)
        cut = delta_configs.solve(self.num_keys, self.dtype)
        solve_kernel[(self._places(),)](
            q, k, beta, self.log_decay, self.sums, self.layout.plan, inverse, scores,
            *self._sizes(), self.layout.num_documents, self.scale,
            *q.stride()[:3], *k.stride()[:3], *beta.stride(),
            K_PER=self._sharing(k), DK=self.num_keys, C=self.chunk, DECAY=self.decay,
            PRECISION="ieee" if self.dtype == torch.float32 else "tf32x3",
            IS_PACKED=self.layout.is_packed, **cut.launch,
        )  # fmt: skip
        return inverse, scores

    def forward(
        self, k: Tensor, v: Tensor, beta: Tensor, inverse: Tensor, initial: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The memory before every chunk ``[S, H, K, V]``, e ``[L, H, V]``, and the final memory."""
        layout = self.layout
        states = self._empty(layout.num_segments, self.num_heads, self.num_keys, self.num_values)
        errors = self._empty(layout.num_all, self.num_heads, self.num_values)
        final = self._new_final()
        cut = delta_configs.scan(self.num_keys, self.num_values, self.dtype)
        forward_kernel[(layout.num_documents * self.num_heads * self._blocks_of_values(cut),)](
            k, k, v, beta, self.log_decay, self.sums, v, inverse, layout.plan, layout.first_segment,
            v if initial is None else initial, final, states, errors, *self._sizes(),
            *k.stride()[:3], *k.stride()[:3], *v.stride()[:3], *beta.stride(),
            K_PER=self._sharing(k), **self._dims(), HAS_INITIAL=initial is not None, **cut.launch,
        )  # fmt: skip
        return states, errors, final

    def output(self, q: Tensor, scores: Tensor, states: Tensor, errors: Tensor) -> Tensor:
        """o, ``[B, T, H, V]``."""
        layout = self.layout
        o = self._empty(layout.num_rows, layout.num_tokens, self.num_heads, self.num_values)
        cut = delta_configs.tiles(self.num_keys, self.num_values, self.dtype)
        output_kernel[(self._places() * self._blocks_of_values(cut),)](
            q, self.log_decay, self.sums, layout.plan, scores, states, errors, o,
            *self._sizes(), layout.num_documents, self.scale, *q.stride()[:3],
            K_PER=self._sharing(q), **self._dims(), **cut.launch,
        )  # fmt: skip
        return o

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        do: Tensor,
        beta: Tensor,
        inverse: Tensor,
        scores: Tensor,
        d_final: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of the memory after every chunk, of v, and of the initial memory."""
        layout = self.layout
        d_states = self._empty(layout.num_segments, self.num_heads, self.num_keys, self.num_values)
        dv = self._empty(layout.num_rows, layout.num_tokens, self.num_heads, self.num_values)
        d_initial = self._new_final()
        cut = delta_configs.scan(self.num_keys, self.num_values, self.dtype)
        backward_kernel[(layout.num_documents * self.num_heads * self._blocks_of_values(cut),)](
            q, k, k, do, beta, self.log_decay, self.sums, do, inverse, scores, layout.plan,
            layout.first_segment, do if d_final is None else d_final, d_initial, d_states, dv,
            *self._sizes(), self.scale,
            *q.stride()[:3], *k.stride()[:3], *k.stride()[:3], *do.stride()[:3], *beta.stride(),
            K_PER=self._sharing(k), **self._dims(), HAS_FINAL=d_final is not None, **cut.launch,
        )  # fmt: skip
        return d_states, dv, d_initial

    def gradients(
        self,
        q: Tensor,
        k: Tensor,
        do: Tensor,
        beta: Tensor,
        errors: Tensor,
        dv: Tensor,
        states: Tensor,
        d_states: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of q and k for every head ``[B, T, H, K]``, of beta ``[B, T, H]`` and the decay; clears dv where no document is."""
        layout = self.layout
        tokens = layout.num_rows, layout.num_tokens, self.num_heads
        dq, dk = self._empty(*tokens, self.num_keys), self._empty(*tokens, self.num_keys)
        cut = delta_configs.gradient(self.num_keys, self.num_values, self.dtype)
        parts = triton.cdiv(self.num_keys, cut.keys)
        d_beta, d_decay = torch.empty(2, parts, *tokens, dtype=torch.float32, device=q.device)
        gradient_kernel[(self._places() * parts,)](
            q, k, do, beta, self.log_decay, self.sums, layout.plan, errors, dv, states, d_states,
            dq, dk, d_beta, d_decay, *self._sizes(), layout.num_documents, self.scale,
            *q.stride()[:3], *k.stride()[:3], *do.stride()[:3], *beta.stride(),
            K_PER=self._sharing(k), **self._dims(), **cut.launch,
        )  # fmt: skip
        if self.decay == NO_DECAY:
            return dq, dk, d_beta.sum(0), None
        return dq, dk, d_beta.sum(0), d_decay.sum((0, 1, 2) if self.decay == HEAD_DECAY else 0)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.log_decay.device)

    def _new_final(self) -> Tensor:
        shape = self.layout.num_documents, self.num_heads, self.num_keys, self.num_values
        return torch.empty(shape, dtype=torch.float32, device=self.log_decay.device)

    def _places(self) -> int:
        return self.layout.num_segments * self.num_heads

    def _blocks_of_values(self, cut: delta_configs.Cut) -> int:
        return triton.cdiv(self.num_values, cut.values)

    def _sharing(self, k: Tensor) -> int:
        return self.num_heads // k.shape[2]

    def _sizes(self) -> tuple[int, int, int, int]:
        layout = self.layout
        return layout.num_tokens, layout.num_all, self.num_heads, layout.segments_per_row

    def _dims(self) -> dict[str, Any]:
        """What every kernel but the one that solves is compiled for."""
        sizes = dict(DK=self.num_keys, DV=self.num_values, C=self.chunk)
        return dict(**sizes, DECAY=self.decay, IS_PACKED=self.layout.is_packed)

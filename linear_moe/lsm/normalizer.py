"""Linear attention divided by the sum of its weights, whose running sum is one more column of the memory.

    [S_t z_t] = [S_{t-1} z_{t-1}] + phi(k_t) [v_t 1]^T
    o_t = S_t^T phi(q_t) / (z_t . phi(q_t) + eps)

So z is started, decayed, packed, gathered and kept like the rest of the memory. Wants weights phi(q) . phi(k) >= 0. In
float16 the sum of the weights must stay below 65504.

Letters: B runs, T tokens, H heads, K channels of phi, V value dim.
Source: arXiv:2006.16236, equation 9.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linear_moe.lsm.recurrence import DiagonalDecay
from linear_moe.lsm.tables import Memory


class NormalizedSum(DiagonalDecay):
    """A memory with one more column, if ``is_normalized``; ``gates`` of a subclass calls :meth:`with_ones` on v."""

    @property
    def normalizer_eps(self) -> float:
        """Added to the sum of the weights."""
        return 1e-6

    @property
    def is_normalized(self) -> bool:
        """Whether outputs are divided."""
        return True

    @property
    def num_keys(self) -> int:
        """Channels of phi."""
        return self.cfg.head_k_dim

    def with_ones(self, v: Tensor) -> Tensor:
        """``[B, T, H, V]`` to ``[B, T, H, V + 1]``, if normalised."""
        return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1) if self.is_normalized else v

    def scan(
        self, *, state: Memory | None, cu_seqlens: Tensor | None, **gated: Tensor
    ) -> tuple[Tensor, Memory]:
        """``[B, T, H, V]`` outputs and the memory after every run."""
        sums, memory = self.sums(state=state, cu_seqlens=cu_seqlens, **gated)
        return self._output(sums), memory

    def sums(
        self, *, state: Memory | None, cu_seqlens: Tensor | None, **gated: Tensor
    ) -> tuple[Tensor, Memory]:
        """Weighted sums of values, beside those of weights if normalised, and the memory after every run."""
        return super().scan(state=state, cu_seqlens=cu_seqlens, **gated)

    def reference(
        self, *, state: Memory | None, cu_seqlens: Tensor | None, **gated: Tensor
    ) -> tuple[Tensor, Memory]:
        """The definition, one token at a time."""
        sums, memory = super().reference(state=state, cu_seqlens=cu_seqlens, **gated)
        return self._output(sums), memory

    def memory_shapes(self) -> tuple[tuple[int, int], ...]:
        """K x V, with a column for the normaliser."""
        return ((self.num_keys, self.cfg.head_v_dim + int(self.is_normalized)),)

    def divided(self, values: Tensor, weights: Tensor) -> Tensor:
        """Sums ``[..., V]`` and ``[..., 1]`` to ``[..., V]``."""
        return values / (weights + self.normalizer_eps)

    def _output(self, sums: Tensor) -> Tensor:
        return self.divided(sums[..., :-1], sums[..., -1:]) if self.is_normalized else sums

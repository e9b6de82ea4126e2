"""The three recurrence families: a mixer that belongs to one says only how its gates are made.

    diagonal decay   S_t = a_t S_{t-1} + k_t v_t^T
    delta rule       S' = a_t S_{t-1},  S_t = S' + beta_t k_t (v_t - S'^T k_t)^T
    low rank         S_t = a_t S_{t-1} + b_t (a'_t^T S_{t-1}) + k_t v_t^T      a' is argument a
    all              o_t = scale S_t^T q_t

``gates`` of a subclass returns the tensors that the public kernels take (:mod:`linear_moe.kernels`), under their names.

Letters: N runs, H heads, K key dim, V value dim.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from linear_moe import kernels
from linear_moe.kernels import Segment, reference
from linear_moe.kernels.arriving import State, states_of
from linear_moe.lsm.mixer import Memory, Mixer

NOT_WRITTEN = ("q", "bonus")
"""Arguments that read the memory and do not change it."""


class OneScan(Mixer):
    """A mixer that is one call of a public kernel, with one memory."""

    operator: ClassVar[str]
    """Name of the kernel, and of its definition; that of its segment ends in ``_segment``."""
    flops_per_element: ClassVar[int]
    """Forward operations of the definition per token and element of the memory."""

    def scan(
        self, *, state: Memory | None, cu_seqlens: Tensor | None, **gated: Tensor
    ) -> tuple[Tensor, Memory]:
        """``[B, T, H, V]`` outputs and the memory after every run."""
        return self._called(kernels, states_of(state)[0], cu_seqlens, gated)

    def segment(self, *, cu_seqlens: Tensor | None, **gated: Tensor) -> tuple[Segment, ...]:
        """What the tokens of every run do to any memory: fade it or apply a K x K matrix to it, and add their own."""
        written = {name: tensor for name, tensor in gated.items() if name not in NOT_WRITTEN}
        return (getattr(kernels, f"{self.operator}_segment")(**written, cu_seqlens=cu_seqlens),)

    def reference(
        self, *, state: Memory | None, cu_seqlens: Tensor | None, **gated: Tensor
    ) -> tuple[Tensor, Memory]:
        """The definition, one token at a time."""
        return self._called(reference, state[0] if state else None, cu_seqlens, gated)

    def scan_flops_per_token(self) -> int:
        """Of the definition: see ``flops_per_element``."""
        return sum(self.flops_per_element * k * v for k, v in self.memory_shapes())

    def _called(
        self, module: Any, state: State, cu_seqlens: Tensor | None, gated: dict[str, Tensor]
    ) -> tuple[Tensor, Memory]:
        options = dict(scale=self.scale, state=state, cu_seqlens=cu_seqlens)
        o, memory = getattr(module, self.operator)(**gated, **options)
        return o, (memory,)


class DiagonalDecay(OneScan):
    """A memory that fades along its rows (or columns) and adds outer products."""

    family = "diagonal decay"
    operator = "diag_decay"
    flops_per_element = 4  # the outer product and the read


class DeltaRule(OneScan):
    """A memory that replaces what a key held."""

    family = "delta rule"
    operator = "delta_rule"
    flops_per_element = 6  # what the key held, the outer product and the read


class DiagonalPlusLowRank(OneScan):
    """A memory that fades along its rows and copies what it holds under one key to another."""

    family = "diagonal plus low rank"
    operator = "dplr_delta_rule"
    flops_per_element = 8  # what the one key held, its copy to the other, the outer product and the read

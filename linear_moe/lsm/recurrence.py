"""The three recurrence families: a mixer that belongs to one says only how its gates are made.

    diagonal decay   S_t = a_t S_{t-1} + k_t v_t^T
    delta rule       S' = a_t S_{t-1},  S_t = S' + beta_t k_t (v_t - S'^T k_t)^T
    low rank         S_t = a_t S_{t-1} + b_t (a'_t^T S_{t-1}) + k_t v_t^T      a' is argument a
    all              o_t = scale S_t^T q_t

``gates`` of a subclass returns the tensors that the public kernels take (:mod:`linear_moe.kernels`), under their names.

Letters: N runs, H heads, K key dim, V value dim.
"""

from __future__ import annotations

from torch import Tensor

from linear_moe import kernels
from linear_moe.kernels import Segment, reference
from linear_moe.lsm.mixer import Memory, Mixer


class DiagonalDecay(Mixer):
    """A memory that fades along its rows (or columns) and adds outer products."""

    family = "diagonal decay"

    def scan(
        self, *, state: Memory | None, cu_seqlens: Tensor | None, **gated: Tensor
    ) -> tuple[Tensor, Memory]:
        """``[B, T, H, V]`` outputs and the memory after every run."""
        o, memory = kernels.diag_decay(**gated, scale=self.scale, state=_only(state), cu_seqlens=cu_seqlens)
        return o, (memory,)

    def segment(self, *, cu_seqlens: Tensor | None, **gated: Tensor) -> tuple[Segment, ...]:
        """Fades any memory by the product of the decays and adds its own."""
        decays = {name: gated[name] for name in ("log_decay", "log_decay_v") if name in gated}
        return (kernels.diag_decay_segment(gated["k"], gated["v"], **decays, cu_seqlens=cu_seqlens),)

    def reference(
        self, *, state: Memory | None, cu_seqlens: Tensor | None, **gated: Tensor
    ) -> tuple[Tensor, Memory]:
        """The definition, one token at a time."""
        o, memory = reference.diag_decay(**gated, scale=self.scale, state=_only(state), cu_seqlens=cu_seqlens)
        return o, (memory,)

    def scan_flops_per_token(self) -> int:
        """The outer product and the read."""
        return sum(4 * k * v for k, v in self.memory_shapes())


class DeltaRule(Mixer):
    """A memory that replaces what a key held."""

    family = "delta rule"

    def scan(
        self, *, state: Memory | None, cu_seqlens: Tensor | None, **gated: Tensor
    ) -> tuple[Tensor, Memory]:
        """``[B, T, H, V]`` outputs and the memory after every run."""
        o, memory = kernels.delta_rule(**gated, scale=self.scale, state=_only(state), cu_seqlens=cu_seqlens)
        return o, (memory,)

    def segment(self, *, cu_seqlens: Tensor | None, **gated: Tensor) -> tuple[Segment, ...]:
        """Applies a K x K matrix to any memory and adds its own."""
        arguments = {name: tensor for name, tensor in gated.items() if name != "q"}
        return (kernels.delta_rule_segment(**arguments, cu_seqlens=cu_seqlens),)

    def reference(
        self, *, state: Memory | None, cu_seqlens: Tensor | None, **gated: Tensor
    ) -> tuple[Tensor, Memory]:
        """The definition, one token at a time."""
        o, memory = reference.delta_rule(**gated, scale=self.scale, state=_only(state), cu_seqlens=cu_seqlens)
        return o, (memory,)

    def scan_flops_per_token(self) -> int:
        """What the key held, the outer product and the read."""
        return sum(6 * k * v for k, v in self.memory_shapes())


class DiagonalPlusLowRank(Mixer):
    """A memory that fades along its rows and copies what it holds under one key to another."""

    family = "diagonal plus low rank"

    def scan(
        self, *, state: Memory | None, cu_seqlens: Tensor | None, **gated: Tensor
    ) -> tuple[Tensor, Memory]:
        """``[B, T, H, V]`` outputs and the memory after every run."""
        options = dict(scale=self.scale, state=_only(state), cu_seqlens=cu_seqlens)
        o, memory = kernels.dplr_delta_rule(**gated, **options)  # type: ignore[arg-type]
        return o, (memory,)

    def segment(self, *, cu_seqlens: Tensor | None, **gated: Tensor) -> tuple[Segment, ...]:
        """Applies a K x K matrix to any memory and adds its own."""
        arguments = {name: tensor for name, tensor in gated.items() if name != "q"}
        return (kernels.dplr_delta_rule_segment(**arguments, cu_seqlens=cu_seqlens),)

    def reference(
        self, *, state: Memory | None, cu_seqlens: Tensor | None, **gated: Tensor
    ) -> tuple[Tensor, Memory]:
        """The definition, one token at a time."""
        options = dict(scale=self.scale, state=_only(state), cu_seqlens=cu_seqlens)
        o, memory = reference.dplr_delta_rule(**gated, **options)  # type: ignore[arg-type]
        return o, (memory,)

    def scan_flops_per_token(self) -> int:
        """What the one key held, its copy to the other, the outer product and the read."""
        return sum(8 * k * v for k, v in self.memory_shapes())


def _only(state: Memory | None) -> Tensor | None:
    return state[0] if state else None

"""Gated DeltaNet: a memory that replaces what a key held instead of adding to it, and fades per head.

    S'  = a_t S_{t-1}                              a_t = exp(-exp(A_log) softplus(W_a x_t + dt_bias))
    S_t = S' + beta_t k_t (v_t - S'^T k_t)^T       beta_t = sigmoid(W_b x_t), k_t and q_t of unit length
    o_t = K^-1/2 S_t^T q_t

With ``values_per_key`` R > 1 each head's query and key serve R memories, every one with a value, a decay, a write
strength and an output gate of its own (the value heads of Qwen3-Next); the R are next to each other in every tensor.

Letters: B runs, T tokens, H heads, R memories of a head, M = H R, K key dim, V value dim.
Source: arXiv:2412.06464, sections 3.1 and 3.4; initialisation of A_log and dt_bias as in the common library.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.kernels import Segment
from linear_moe.kernels.arriving import Arriving
from linear_moe.lsm import output
from linear_moe.lsm.gating import activated, init_dt_bias, init_log_rate, unit, write_strength
from linear_moe.lsm.mixer import Memory, Mixer, Parameter, Placement, Projection
from linear_moe.lsm.options import one_of, positive
from linear_moe.lsm.recurrence import DeltaRule
from linear_moe.lsm.registry import register
from linear_moe.lsm.tables import widen


@register("gated_deltanet")
class GatedDeltaNet(DeltaRule):
    """One matrix memory per head, written by the delta rule and faded by a scalar gate."""

    source = "arXiv:2412.06464, sections 3.1 and 3.4"

    @dataclass(kw_only=True)
    class Config(Mixer.Config):
        """Options of gated DeltaNet."""

        conv_size: int = 4
        """Width of the causal short convolution on q, k and v; 0: none (then SiLU alone)."""
        allow_neg_eigval: bool = False
        """beta in (0, 2) instead of (0, 1): the transition may flip a direction."""
        values_per_key: int = 1
        """R: memories of a head, which share its query and key; each has ``expand_v * head_dim`` value channels."""

        def __post_init__(self) -> None:
            super().__post_init__()
            positive("values_per_key", self.values_per_key, "it counts the memories of a head", 1)
            if self.values_per_key > 1:
                one_of("output_norm", self.output_norm, ("rmsnorm", "identity"))

        @property
        def head_v_dim(self) -> int:
            """R * V: the value channels of a head, those of all its memories."""
            return self.values_per_key * int(self.expand_v * self.head_dim)

    cfg: Config

    def projections(self) -> tuple[Projection, ...]:
        """q, k, v through the short convolution, the decay logit a and the write strength logit b."""
        memories = self.cfg.values_per_key
        return (
            *self.qkv(),
            Projection("a", memories),
            Projection("b", memories),
        )

    def parameters(self) -> tuple[Parameter, ...]:
        """The rate and the bias of the decay, ``[H]`` or ``[H, R]``, float32 in any model."""
        heads, memories = self.cfg.num_heads, self.cfg.values_per_key
        shape = (heads,) if memories == 1 else (heads, memories)
        return (
            Parameter("A_log", shape, partial(init_log_rate, least=0.0), keep_float32=True),
            Parameter("dt_bias", shape, init_dt_bias, keep_float32=True),
        )

    def gates(self, p: dict[str, Tensor], w: dict[str, Tensor], place: Placement) -> dict[str, Tensor]:
        """Unit q and k of every head; values, decay and write strength (float32) of every memory."""
        q, k, v = (activated(p[name], self.cfg.conv_size) for name in "qkv")
        a_BTM, b_BTM = (p[name].flatten(2) for name in "ab")
        rate_M, bias_M = widen(w["A_log"]).flatten().exp(), widen(w["dt_bias"]).flatten()
        log_decay_BTM = -rate_M * F.softplus(widen(a_BTM) + bias_M)
        return {
            "q": unit(q),
            "k": unit(k),
            "v": self._by_memory(v),
            "beta": write_strength(b_BTM.unsqueeze(-1), self.cfg.allow_neg_eigval),
            "log_decay": log_decay_BTM,
        }

    def scan(
        self, *, state: Memory | None, cu_seqlens: Tensor | None, **gated: Tensor
    ) -> tuple[Tensor, Memory]:
        """``[B, T, H, R * V]`` outputs and the R memories after every run."""
        o_BTMV, (memory,) = super().scan(state=self._joined(state), cu_seqlens=cu_seqlens, **gated)
        return self._by_head(o_BTMV), self._apart(memory)

    def segment(self, *, cu_seqlens: Tensor | None, **gated: Tensor) -> tuple[Segment, ...]:
        """What the tokens do to each of the R memories."""
        (joined,) = super().segment(cu_seqlens=cu_seqlens, **gated)
        assert joined.decay is not None and joined.log_decay is None
        pairs = zip(self._apart(joined.state), self._apart(joined.decay), strict=True)
        return tuple(Segment(state, decay=decay) for state, decay in pairs)

    def reference(
        self, *, state: Memory | None, cu_seqlens: Tensor | None, **gated: Tensor
    ) -> tuple[Tensor, Memory]:
        """The definition, one token at a time."""
        o_BTMV, (memory,) = super().reference(state=self._joined(state), cu_seqlens=cu_seqlens, **gated)
        return self._by_head(o_BTMV), self._apart(memory)

    def read_out(
        self, o_BTHC: Tensor, p: dict[str, Tensor], w: dict[str, Tensor], place: Placement
    ) -> Tensor:
        """Norm and gate of what every memory gave, ``[B, T, H, R * V]``."""
        o_BTMV, g_BTMV = self._by_memory(o_BTHC), self._by_memory(p["g"]) if "g" in p else None
        return self._by_head(output.read_out(o_BTMV, g_BTMV, w, self.cfg, self.num_norm_groups, place))

    def memory_shapes(self) -> tuple[tuple[int, int], ...]:
        """R of the same shape."""
        count = self.cfg.values_per_key
        return ((self.cfg.head_k_dim, self.cfg.head_v_dim // count),) * count

    def _norm_parameters(self) -> list[Parameter]:
        """One weight for the memories of all heads."""
        found = super()._norm_parameters()
        if self.cfg.values_per_key == 1:
            return found
        values = self.cfg.head_v_dim // self.cfg.values_per_key
        return [replace(table, shape=(values,)) for table in found]

    def _joined(self, state: Memory | None) -> Memory | None:
        """R memories of every head, ``[N, H, K, V]`` each, as those of ``H * R`` heads."""
        if not state or len(state) == 1:
            return state
        return Arriving(1, lambda: [torch.stack(tuple(state), dim=2).flatten(1, 2)])

    def _apart(self, x_NM: Tensor) -> tuple[Tensor, ...]:
        """``[N, H * R, ..]`` to R of ``[N, H, ..]``."""
        memories = self.cfg.values_per_key
        return (x_NM,) if memories == 1 else x_NM.unflatten(1, (-1, memories)).unbind(2)

    def _by_memory(self, x_BTHC: Tensor) -> Tensor:
        """``[B, T, H, R * V]`` to ``[B, T, H * R, V]``."""
        return x_BTHC.unflatten(3, (self.cfg.values_per_key, -1)).flatten(2, 3)

    def _by_head(self, x_BTMV: Tensor) -> Tensor:
        """The inverse."""
        return x_BTMV.unflatten(2, (-1, self.cfg.values_per_key)).flatten(3)

"""Gated linear attention: a memory that fades per key channel, at a rate each token chooses.

    S_t = diag(a_t) S_{t-1} + k_t v_t^T            a_t = sigmoid(W_2 W_1 x_t + b) ** (1 / 16)
    o_t = K^-1/2 S_t^T q_t

Letters: B runs, T tokens, H heads, K key dim, V value dim.
Source: arXiv:2312.06635, section 4; low-rank gate of 16 and half-width keys as in the common library.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linear_moe.kernels import log_decay_of
from linear_moe.lsm.mixer import Mixer, Placement, Projection
from linear_moe.lsm.options import positive
from linear_moe.lsm.recurrence import DiagonalDecay
from linear_moe.lsm.registry import register


@register("gla")
class GatedLinearAttention(DiagonalDecay):
    """One matrix memory per head, with a decay per key channel from a low-rank gate."""

    source = "arXiv:2312.06635, section 4"

    @dataclass(kw_only=True)
    class Config(Mixer.Config):
        """Options of gated linear attention."""

        expand_k: float = 0.5
        """Key dim per head is ``expand_k * head_dim``."""
        gate_rank: int = 16
        """Waist of the low-rank gate projection."""
        gate_logit_normalizer: float = 16.0
        """Divides the log of the gate: the larger, the longer the memory at initialisation."""
        gate_clamp_min: float | None = None
        """Lower bound of the log decay per token; none by default."""

        def __post_init__(self) -> None:
            super().__post_init__()
            positive("gate_rank", self.gate_rank, "the gate passes through that many channels", 16)
            why = "the log of the gate is divided by it, and a memory must not grow"
            positive("gate_logit_normalizer", self.gate_logit_normalizer, why, 16.0)
            if self.gate_clamp_min is not None and self.gate_clamp_min > 0:
                raise ValueError(
                    f"gate_clamp_min is {self.gate_clamp_min}\n"
                    f"  why: it bounds a log decay, and a memory that grows is not stable\n"
                    f"  try: -0.5, or None"
                )

    cfg: Config

    def projections(self) -> tuple[Projection, ...]:
        """q, k, v and the low-rank decay gate."""
        gate = Projection("a", self.cfg.head_k_dim, bias=True, rank=self.cfg.gate_rank)
        return (*self.qkv(), gate)

    def gates(self, p: dict[str, Tensor], w: dict[str, Tensor], place: Placement) -> dict[str, Tensor]:
        """The log decay in float32: it is summed over the whole sequence."""
        log_decay_BTHK = log_decay_of(p["a"], form="log_sigmoid", scale=1 / self.cfg.gate_logit_normalizer)
        if self.cfg.gate_clamp_min is not None:
            log_decay_BTHK = log_decay_BTHK.clamp_min(self.cfg.gate_clamp_min)
        return {"q": p["q"], "k": p["k"], "v": p["v"], "log_decay": log_decay_BTHK}

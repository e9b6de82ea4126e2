"""Kimi delta attention: a memory that replaces what a key held, and fades per key channel.

    S'  = diag(a_t) S_{t-1}                        a_t = exp(-exp(A_log) softplus(W_2 W_1 x_t + dt_bias))
    S_t = S' + beta_t k_t (v_t - S'^T k_t)^T       beta_t = sigmoid(W_b x_t), k_t and q_t of unit length
    o_t = K^-1/2 S_t^T q_t                         y_t = RMSNorm(o_t) sigmoid(W_4 W_3 x_t + b)

With a lower bound L < 0: a_t = exp(L sigmoid(exp(A_log) (W_2 W_1 x_t + dt_bias))).

Letters: B runs, T tokens, H heads, K key dim, V value dim.
Source: arXiv:2510.26692, sections 3 and 4; initialisation, waists as wide as a value head, and the lower bound as in
the common library. The library's grouped values (fewer q and k heads than v heads) are not offered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linear_moe.kernels import log_decay_of
from linear_moe.lsm.gating import activated, init_dt_bias, init_log_rate, unit, write_strength
from linear_moe.lsm.mixer import Mixer, Parameter, Placement, Projection
from linear_moe.lsm.options import positive
from linear_moe.lsm.recurrence import DeltaRule
from linear_moe.lsm.registry import register
from linear_moe.lsm.tables import widen


@register("kda")
class KimiDeltaAttention(DeltaRule):
    """One matrix memory per head, written by the delta rule and faded by a gate per key channel."""

    source = "arXiv:2510.26692, section 3"

    @dataclass(kw_only=True)
    class Config(Mixer.Config):
        """Options of Kimi delta attention."""

        conv_size: int = 4
        """Width of the causal short convolution on q, k and v; 0: none (then SiLU alone)."""
        output_gate: str = "sigmoid"
        """Activation of the output gate: swish, sigmoid or none."""
        gate_rank: int | None = None
        """Waist of the low-rank projections of the decay and of the output gate; None: the value dim of a head."""
        allow_neg_eigval: bool = False
        """beta in (0, 2) instead of (0, 1): the transition may flip a direction (arXiv:2411.12537)."""
        lower_bound: float | None = None
        """The log decay stays above it, at least -5; None: no bound, and a softplus instead of a sigmoid."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.gate_rank is not None:
                positive("gate_rank", self.gate_rank, "the gates pass through that many channels", "None")
            if self.lower_bound is not None and not -5 <= self.lower_bound < 0:
                raise ValueError(
                    f"lower_bound is {self.lower_bound}\n"
                    f"  why: it bounds a log decay; a memory must not grow, and below exp(-5) nothing is left\n"
                    f"  try: -5.0, or None"
                )

    cfg: Config

    def projections(self) -> tuple[Projection, ...]:
        """q, k, v through the short convolution, the write strength logit b and the low-rank decay logit f."""
        decay = Projection("f", self.cfg.head_k_dim, rank=self._rank)
        return (*self.qkv(), Projection("b", 1), decay)

    def output_projections(self) -> tuple[Projection, ...]:
        """The output gate, low-rank too."""
        gate = Projection("g", self.cfg.head_v_dim, bias=True, rank=self._rank)
        return () if self.cfg.output_gate == "none" else (gate,)

    def parameters(self) -> tuple[Parameter, ...]:
        """The rate of the decay per head and its bias per channel, float32 in any model."""
        heads = (self.cfg.num_heads,)
        init_rate = init_log_rate if self.cfg.lower_bound is None else torch.nn.init.zeros_
        return (
            Parameter("A_log", heads, init_rate, keep_float32=True),
            Parameter("dt_bias", (*heads, self.cfg.head_k_dim), init_dt_bias, keep_float32=True),
        )

    def gates(self, p: dict[str, Tensor], w: dict[str, Tensor], place: Placement) -> dict[str, Tensor]:
        """Unit q and k, decay and write strength in float32."""
        q, k, v = (activated(p[name], self.cfg.conv_size) for name in "qkv")
        rate_H = widen(w["A_log"]).exp()
        if self.cfg.lower_bound is None:
            log_decay_BTHK = log_decay_of(p["f"], rate_H, w["dt_bias"])
        else:
            logit_BTHK = rate_H[:, None] * (widen(p["f"]) + widen(w["dt_bias"]))
            log_decay_BTHK = log_decay_of(logit_BTHK, form="sigmoid", scale=-self.cfg.lower_bound)
        return {
            "q": unit(q),
            "k": unit(k),
            "v": v,
            "beta": write_strength(p["b"], self.cfg.allow_neg_eigval),
            "log_decay": log_decay_BTHK,
        }

    @property
    def _rank(self) -> int:
        return self.cfg.gate_rank or self.cfg.head_v_dim

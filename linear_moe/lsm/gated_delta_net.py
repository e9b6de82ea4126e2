"""Gated DeltaNet: a memory that replaces what a key held instead of adding to it, and fades per head.

    S'  = a_t S_{t-1}                              a_t = exp(-exp(A_log) softplus(W_a x_t + dt_bias))
    S_t = S' + beta_t k_t (v_t - S'^T k_t)^T       beta_t = sigmoid(W_b x_t), k_t and q_t of unit length
    o_t = K^-1/2 S_t^T q_t

Letters: B runs, T tokens, H heads, K key dim, V value dim.
Source: arXiv:2412.06464, sections 3.1 and 3.4; initialisation of A_log and dt_bias as in the common library.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from linear_moe.lsm.gating import init_dt_bias, unit, write_strength
from linear_moe.lsm.mixer import Mixer
from linear_moe.lsm.recurrence import DeltaRule
from linear_moe.lsm.registry import register
from linear_moe.lsm.tables import Parameter, Placement, Projection, widen


def init_log_rate(x: Tensor) -> None:
    """``A_log``: the logarithm of a rate drawn uniformly from (0, 16]."""
    x.uniform_(0, 16).clamp_min_(1e-4).log_()


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

    cfg: Config

    def projections(self) -> tuple[Projection, ...]:
        """q, k, v through the short convolution, the decay logit a and the write strength logit b."""
        return (*self.qkv(conv=self.cfg.conv_size > 0), Projection("a", 1), Projection("b", 1))

    def parameters(self) -> tuple[Parameter, ...]:
        """The rate and the bias of the decay, float32 in any model."""
        heads = (self.cfg.num_heads,)
        return (
            Parameter("A_log", heads, init_log_rate, keep_float32=True),
            Parameter("dt_bias", heads, init_dt_bias, keep_float32=True),
        )

    def gates(self, p: dict[str, Tensor], w: dict[str, Tensor], place: Placement) -> dict[str, Tensor]:
        """Unit q and k, decay and write strength in float32."""
        q, k, v = (p[name] if self.cfg.conv_size else F.silu(p[name]) for name in "qkv")
        rate_H = widen(w["A_log"]).exp()
        log_decay_BTH = -rate_H * F.softplus(widen(p["a"]).squeeze(-1) + widen(w["dt_bias"]))
        return {
            "q": unit(q),
            "k": unit(k),
            "v": v,
            "beta": write_strength(p["b"], self.cfg.allow_neg_eigval),
            "log_decay": log_decay_BTH,
        }

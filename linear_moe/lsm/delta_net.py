"""DeltaNet: a memory that replaces what a key held instead of adding to it, and never fades.

    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T      beta_t = sigmoid(W_b x_t), k_t and q_t of unit length
    o_t = K^-1/2 S_t^T q_t

Letters: B runs, T tokens, H heads, K key dim, V value dim.
Source: arXiv:2406.06484, sections 2.2 and 3.3. As in the common library: SiLU on q, k and v after the convolution (or
alone), an RMS norm of the output and no output gate. Its other activations of q and k (relu, elu, none) are not
offered: they belong to the older form of arXiv:2102.11174.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.lsm.gating import activated, unit, write_strength
from linear_moe.lsm.mixer import Mixer, Placement, Projection
from linear_moe.lsm.options import one_of
from linear_moe.lsm.recurrence import DeltaRule
from linear_moe.lsm.registry import register
from linear_moe.lsm.tables import widen


@register("deltanet")
class DeltaNet(DeltaRule):
    """One matrix memory per head, written by the delta rule."""

    source = "arXiv:2406.06484, sections 2.2 and 3.3"

    @dataclass(kw_only=True)
    class Config(Mixer.Config):
        """Options of DeltaNet."""

        conv_size: int = 4
        """Width of the causal short convolution on q, k and v; 0: none (then SiLU alone)."""
        output_gate: str = "none"
        """Activation of the output gate: swish, sigmoid or none."""
        qk_norm: str = "l2"
        """Norm of q and k: l2, or sum (absolute values sum to 1; keys below unit length write less than beta)."""
        use_beta: bool = True
        """A write strength per token and head; otherwise every token overwrites: beta is 1."""
        allow_neg_eigval: bool = False
        """beta in (0, 2) instead of (0, 1): the transition may flip a direction (arXiv:2411.12537)."""

        def __post_init__(self) -> None:
            super().__post_init__()
            one_of("qk_norm", self.qk_norm, ("l2", "sum"))

    cfg: Config

    def projections(self) -> tuple[Projection, ...]:
        """q, k, v through the short convolution and the write strength logit b."""
        strength = (Projection("b", 1),) if self.cfg.use_beta else ()
        return (*self.qkv(), *strength)

    def gates(self, p: dict[str, Tensor], w: dict[str, Tensor], place: Placement) -> dict[str, Tensor]:
        """Normed q and k, write strength in float32."""
        q, k, v = (activated(p[name], self.cfg.conv_size) for name in "qkv")
        norm = unit if self.cfg.qk_norm == "l2" else _sum_norm
        if self.cfg.use_beta:
            beta_BTH = write_strength(p["b"], self.cfg.allow_neg_eigval)
        else:
            strength = 2.0 if self.cfg.allow_neg_eigval else 1.0
            beta_BTH = torch.full_like(widen(v[..., 0]), strength, requires_grad=False)
        return {"q": norm(q), "k": norm(k), "v": v, "beta": beta_BTH}


def _sum_norm(x: Tensor) -> Tensor:
    """L1 norm 1 over the last dimension, as in the common library."""
    return F.normalize(widen(x), p=1.0, dim=-1, eps=1e-6).to(x.dtype)

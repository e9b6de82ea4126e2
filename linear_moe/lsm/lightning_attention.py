"""Lightning attention: a memory that fades at a fixed rate, slower for lower heads and deeper layers.

    S_t = a_h S_{t-1} + phi(k_t) v_t^T
    o_t = K^-1/2 S_t^T phi(q_t)

    transnormer   log a_h = -8 h / H (1 - l / L)                                  h = 0 .. H-1, l = 0 .. L-1
    alibi         log a_h = -2^(-8 (h + 1) / H) (1 - l / (L - 1 + 1e-5) + 1e-5)

Letters: B runs, T tokens, H heads of the whole layer, h global index of a head, L layers of the model, l index of this
one, K key dim, V value dim.
Source: arXiv:2405.17381, section 3; decay by head and layer of arXiv:2307.14995, section 3.1. The default decay is the
common library's, in which the first head never forgets; alibi is MiniMax-01's (arXiv:2501.08313). phi is the swish of
arXiv:2307.14995; the library leaves it to the caller. The papers' models gate the output without an activation
(MiniMax-01: sigmoid) and norm over the full width; here gate and norm are those of every mixer, a swish and an RMS norm
per head, as in the earlier Linear-MoE system.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linear_moe.lsm.feature_maps import PLAIN
from linear_moe.lsm.mixer import Mixer, Placement, Projection
from linear_moe.lsm.options import one_of
from linear_moe.lsm.recurrence import DiagonalDecay
from linear_moe.lsm.registry import register


@register("lightning_attention")
class LightningAttention(DiagonalDecay):
    """One matrix memory per head, with a constant decay per head and layer."""

    source = "arXiv:2405.17381, section 3"

    @dataclass(kw_only=True)
    class Config(Mixer.Config):
        """Options of lightning attention."""

        feature_map: str = "swish"
        """phi of queries and keys: identity, elu (plus 1), relu or swish."""
        slopes: str = "transnormer"
        """Decay by head and layer: transnormer (the common library) or alibi (MiniMax-01)."""

        def __post_init__(self) -> None:
            super().__post_init__()
            one_of("feature_map", self.feature_map, tuple(PLAIN))
            one_of("slopes", self.slopes, ("transnormer", "alibi"))

    cfg: Config

    def projections(self) -> tuple[Projection, ...]:
        """q, k and v."""
        return self.qkv()

    def gates(self, p: dict[str, Tensor], w: dict[str, Tensor], place: Placement) -> dict[str, Tensor]:
        """Map q and k; the log decay is a constant, without gradient."""
        phi = PLAIN[self.cfg.feature_map]
        dtype = torch.promote_types(p["v"].dtype, torch.float32)
        head_H = torch.arange(place.num_heads, device=p["v"].device, dtype=dtype) + place.first_head
        if self.cfg.slopes == "transnormer":
            depth = 1 - place.layer / place.num_layers
            log_decay_H = -8 * depth / self.cfg.num_heads * head_H
        else:
            depth = 1 - place.layer / (place.num_layers - 1 + 1e-5) + 1e-5
            log_decay_H = -depth * torch.exp2(-8 / self.cfg.num_heads * (head_H + 1))
        return {"q": phi(p["q"], w, ""), "k": phi(p["k"], w, ""), "v": p["v"], "log_decay": log_decay_H}

"""Retention: a memory that fades at a fixed rate per head, with rotary positions on queries and keys.

    S_t = a_h S_{t-1} + R_t k_t v_t^T              a_h = 1 - 2^(-5 - h),  h = 0 .. H-1
    o_t = K^-1/2 S_t^T R_t q_t

R_t turns channels i and i + K/2 by the angle t b^(-2i/K). With xpos, channel i also fades by zeta_i^(1/512) per token,
zeta_i = (2i/K + 0.4) / 1.4: the growing powers of xPos are a decay of the memory, so nothing ever overflows.

Letters: B rows, T tokens, t position in the document, H heads of the whole layer, h global index of a head, K key dim,
V value dim, b rotary base.
Source: arXiv:2307.08621, section 2; xPos: arXiv:2212.10554, section 3. As in the common library, where it differs from
the paper: rotation without xPos by default, a scale of K^-1/2 instead of the paper's normalised scores, decays in the
order of the heads whatever their number, and an RMS norm per head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linear_moe.kernels import rotate_heads
from linear_moe.lsm.mixer import Mixer, Placement, Projection
from linear_moe.lsm.options import one_of, positive
from linear_moe.lsm.recurrence import DiagonalDecay
from linear_moe.lsm.registry import register

XPOS_SCALE_BASE, XPOS_SMOOTHING = 512, 0.4
"""Tokens over which channel i fades by zeta_i, and what keeps the fastest channel from vanishing (arXiv:2212.10554)."""


@register("retention")
class Retention(DiagonalDecay):
    """One matrix memory per head, with a constant decay per head and rotary queries and keys."""

    source = "arXiv:2307.08621, section 2"
    uses_positions = True

    @dataclass(kw_only=True)
    class Config(Mixer.Config):
        """Options of retention."""

        expand_v: float = 2.0
        """Value dim per head is ``expand_v * head_dim``."""
        rotary: str = "rope"
        """Positions of queries and keys: rope, xpos (rope, and a decay per channel) or none."""
        rotary_base: float = 10000.0
        """b: the slowest channels turn about once in 2 pi b tokens."""

        def __post_init__(self) -> None:
            super().__post_init__()
            one_of("rotary", self.rotary, ("rope", "xpos", "none"))
            positive("rotary_base", self.rotary_base, "angles are powers of it", 10000.0)
            if self.rotary != "none" and self.head_k_dim % 2:
                raise ValueError(
                    f"expand_k {self.expand_k} gives keys of {self.head_k_dim} channels\n"
                    f"  why: rotary positions turn channels in pairs\n"
                    f"  try: an even number, or rotary none"
                )

    cfg: Config

    def projections(self) -> tuple[Projection, ...]:
        """q, k and v."""
        return self.qkv()

    def gates(self, p: dict[str, Tensor], w: dict[str, Tensor], place: Placement) -> dict[str, Tensor]:
        """Turn q and k; the log decay is a constant, without gradient."""
        q_BTHK, k_BTHK = p["q"], p["k"]
        exact = torch.promote_types(q_BTHK.dtype, torch.float32)
        head_H = torch.arange(place.num_heads, device=q_BTHK.device, dtype=exact) + place.first_head
        log_decay = torch.log1p(-torch.exp2(-5 - head_H))
        if self.cfg.rotary != "none":
            q_BTHK, k_BTHK = rotate_heads(q_BTHK, k_BTHK, self._angles(p["positions"]))
        if self.cfg.rotary == "xpos":
            log_decay = (log_decay[:, None] + self._log_zeta(log_decay)).expand(q_BTHK.shape)
        return {"q": q_BTHK, "k": k_BTHK, "v": p["v"], "log_decay": log_decay}

    def _angles(self, positions_BT: Tensor) -> Tensor:
        """``[B, T, K / 2]`` in float64: those of float32 are off by 0.06 at a million tokens."""
        num_keys = self.cfg.head_k_dim
        powers = torch.arange(0, num_keys, 2, device=positions_BT.device, dtype=torch.float64) / num_keys
        return positions_BT.double().unsqueeze(-1) * self.cfg.rotary_base**-powers

    def _log_zeta(self, like: Tensor) -> Tensor:
        """Log decay per token of each channel, ``[K]``: the two of a pair fade alike."""
        num_keys = self.cfg.head_k_dim
        pair = torch.arange(0, num_keys, 2, device=like.device, dtype=like.dtype) / num_keys
        log_zeta = torch.log((pair + XPOS_SMOOTHING) / (1 + XPOS_SMOOTHING)) / XPOS_SCALE_BASE
        return torch.cat([log_zeta, log_zeta])

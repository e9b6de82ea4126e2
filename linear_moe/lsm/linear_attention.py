"""Basic linear attention: a memory that only adds.

    S_t = S_{t-1} + phi(k_t) v_t^T
    o_t = K^-1/2 S_t^T phi(q_t)                    normalised: divided by phi(q_t) . sum_{s <= t} phi(k_s)

Letters: B runs, T tokens, H heads, K key dim, V value dim.
Source: arXiv:2006.16236, section 3.2 (elu + 1 and the normaliser); output norm instead of the normaliser by default, as
arXiv:2210.10340 and the common library do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.lsm.mixer import Memory, Mixer, Placement, Projection
from linear_moe.lsm.options import one_of
from linear_moe.lsm.recurrence import DiagonalDecay
from linear_moe.lsm.registry import register

FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "swish": F.silu,
}


@register("linear_attention")
class LinearAttention(DiagonalDecay):
    """One matrix memory per head that sums outer products of mapped keys and values."""

    source = "arXiv:2006.16236, section 3.2"

    @dataclass(kw_only=True)
    class Config(Mixer.Config):
        """Options of basic linear attention."""

        feature_map: str = "elu"
        """phi of keys and queries: identity, elu (plus 1), relu or swish."""
        normalize: bool = False
        """Divide by the sum of the attention weights; wants a positive feature map."""

        def __post_init__(self) -> None:
            super().__post_init__()
            one_of("feature_map", self.feature_map, tuple(FEATURE_MAPS))

    cfg: Config

    def projections(self) -> tuple[Projection, ...]:
        """q, k and v."""
        return self.qkv(conv=self.cfg.conv_size > 0)

    def gates(self, p: dict[str, Tensor], w: dict[str, Tensor], place: Placement) -> dict[str, Tensor]:
        """Map q and k; the normaliser is one more value channel that is always 1."""
        phi = FEATURE_MAPS[self.cfg.feature_map]
        v = p["v"]
        if self.cfg.normalize:
            v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        return {"q": phi(p["q"]), "k": phi(p["k"]), "v": v}

    def scan(
        self, *, state: Memory | None, cu_seqlens: Tensor | None, **gated: Tensor
    ) -> tuple[Tensor, Memory]:
        """``[B, T, H, V]`` outputs and the memory after every run."""
        o, memory = super().scan(state=state, cu_seqlens=cu_seqlens, **gated)
        return self._normalized(o), memory

    def reference(
        self, *, state: Memory | None, cu_seqlens: Tensor | None, **gated: Tensor
    ) -> tuple[Tensor, Memory]:
        """The definition above."""
        o, memory = super().reference(state=state, cu_seqlens=cu_seqlens, **gated)
        return self._normalized(o), memory

    def memory_shapes(self) -> tuple[tuple[int, int], ...]:
        """K x V, with a column for the normaliser."""
        return ((self.cfg.head_k_dim, self.cfg.head_v_dim + int(self.cfg.normalize)),)

    def _normalized(self, o: Tensor) -> Tensor:
        if not self.cfg.normalize:
            return o
        return o[..., :-1] / (o[..., -1:] + 1e-6)

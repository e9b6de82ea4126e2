"""Basic linear attention: a memory that only adds.

    S_t = S_{t-1} + phi(k_t) v_t^T
    o_t = K^-1/2 S_t^T phi(q_t)                    normalised: divided by phi(q_t) . sum_{s <= t} phi(k_s)

phi is one of :mod:`linear_moe.lsm.feature_maps`; norm_q and norm_k divide phi(q_t), phi(k_t) by their sums of channels.

Letters: B runs, T tokens, H heads, K key dim (after phi), V value dim.
Source: arXiv:2006.16236, section 3.2 (elu + 1 and the normaliser); output norm instead of the normaliser by default, as
arXiv:2210.10340 and the common library do. The library's default map is elementwise_product and it has no output gate;
here elu and a swish gate, as in the earlier Linear-MoE system.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from linear_moe.lsm.feature_maps import FEATURE_MAPS, FeatureMap
from linear_moe.lsm.mixer import Mixer, Parameter, Placement, Projection
from linear_moe.lsm.normalizer import NormalizedSum
from linear_moe.lsm.options import kernel_width, one_of
from linear_moe.lsm.registry import register
from linear_moe.lsm.tables import widen


@register("linear_attention")
class LinearAttention(NormalizedSum):
    """One matrix memory per head that sums outer products of mapped keys and values."""

    source = "arXiv:2006.16236, section 3.2"

    @dataclass(kw_only=True)
    class Config(Mixer.Config):
        """Options of basic linear attention."""

        feature_map: str = "elu"
        """phi of queries and keys: identity, elu (plus 1), relu, swish, hedgehog, t2r, elementwise_product or dpfp."""
        tie_feature_map_qk: bool = False
        """One set of weights of a learned phi for queries and keys."""
        norm_q: bool = False
        """Divide mapped queries by the sum of their channels; wants a map that is not negative, see normalize."""
        norm_k: bool = False
        """Divide mapped keys by the sum of their channels; wants a map that is not negative, see normalize."""
        normalize: bool = False
        """Divide by the sum of the attention weights; with identity, swish or a product it may be 0 (a warning)."""

        def __post_init__(self) -> None:
            super().__post_init__()
            one_of("feature_map", self.feature_map, tuple(FEATURE_MAPS))
            attempt = "a map that keeps the width (elu), or a smaller expand_k"
            kernel_width("feature_map", self.feature_map, self.mapped_k_dim, attempt)
            num_values = self.head_v_dim + self.normalize
            kernel_width("normalize", self.normalize, num_values, "False, or a smaller expand_v")
            divided = tuple(name for name in ("norm_q", "norm_k", "normalize") if getattr(self, name))
            if divided and FEATURE_MAPS[self.feature_map].has_signs:
                _warn_of_signs_once(self.feature_map, divided)

        @property
        def mapped_k_dim(self) -> int:
            """K: channels of phi."""
            return self.head_k_dim * FEATURE_MAPS[self.feature_map].expansion

    cfg: Config

    def projections(self) -> tuple[Projection, ...]:
        """q, k and v."""
        return self.qkv()

    def parameters(self) -> tuple[Parameter, ...]:
        """The weights of a learned phi, the same for all heads."""
        prefixes = dict.fromkeys(self._prefix(name) for name in "qk")
        return tuple(x for prefix in prefixes for x in self.phi.parameters(prefix, self.cfg.head_k_dim))

    def gates(self, p: dict[str, Tensor], w: dict[str, Tensor], place: Placement) -> dict[str, Tensor]:
        """Map q and k; the normaliser is one more value channel that is always 1."""
        q, k = (self.phi(p[name], w, self._prefix(name)) for name in "qk")
        return {
            "q": _sum_norm(q) if self.cfg.norm_q else q,
            "k": _sum_norm(k) if self.cfg.norm_k else k,
            "v": self.with_ones(p["v"]),
        }

    @property
    def phi(self) -> FeatureMap:
        """The feature map."""
        return FEATURE_MAPS[self.cfg.feature_map]

    @property
    def is_normalized(self) -> bool:
        """Whether outputs are divided by the sum of the weights."""
        return self.cfg.normalize

    @property
    def num_keys(self) -> int:
        """Channels of phi."""
        return self.cfg.mapped_k_dim

    @property
    def scale(self) -> float:
        """Of the mapped keys, as in the common library."""
        return self.num_keys**-0.5

    def scan_flops_per_token(self) -> int:
        """The recurrence, and the matrices of phi for q and for k."""
        maps = 2 * len(self.phi.matrices) * 2 * self.cfg.head_k_dim**2
        return super().scan_flops_per_token() + maps

    def _prefix(self, name: str) -> str:
        return "feature_map" if self.cfg.tie_feature_map_qk else f"feature_map_{name}"


@cache
def _warn_of_signs_once(feature_map: str, options: tuple[str, ...]) -> None:
    """A warning, since models are trained so elsewhere, the common library's too, and their checkpoints must open."""
    warnings.warn(
        f"linear attention divides by sums ({', '.join(options)}) of a feature map with negative channels "
        f"({feature_map}): a sum may be 0 or change its sign, and near 0 outputs and gradients have no bound, so "
        f"training may diverge; elu, relu, hedgehog, t2r and dpfp are never negative, and without these options the "
        f"output norm keeps outputs in bounds",
        stacklevel=2,
    )


def _sum_norm(x: Tensor) -> Tensor:
    """Channels that sum to 1; 1e-4 is the common library's."""
    wide = widen(x)
    return (wide / (wide.sum(-1, keepdim=True) + 1e-4)).to(x.dtype)

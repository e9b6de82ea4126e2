"""Based: linear attention whose weights are the exponential's Taylor series, of short queries and keys.

    phi(x) = [1, x_i / K^1/4, x_i^2 / sqrt(2 K), x_i x_j / sqrt(K) for i < j]
    phi(q) . phi(k) = 1 + s + s^2 / 2,  s = q . k / sqrt(K)
    S_t = S_{t-1} + phi(k_t) v_t^T
    o_t = S_t^T phi(q_t) / (phi(q_t) . sum_{s <= t} phi(k_s) + eps)

Letters: B runs, T tokens, H heads, K channels of a query or key, V value dim; phi has 1 + K + K (K + 1) / 2 channels.
Source: arXiv:2402.18668, section 4.1, without its sliding-window layers (softmax layers of a pattern take their place).
As in the common library: 16 channels, no output norm and no gate; eps is that of its parallel form (its other forms
have 1e-10 and 1e-12; weights are at least 1/2, so it never matters).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linear_moe.lsm.feature_maps import second_order
from linear_moe.lsm.quadratic import QuadraticAttention
from linear_moe.lsm.registry import register
from linear_moe.lsm.tables import widen


@register("based")
class Based(QuadraticAttention):
    """One matrix memory per head, of the values by the Taylor features of the keys."""

    source = "arXiv:2402.18668, section 4.1"

    @dataclass(kw_only=True)
    class Config(QuadraticAttention.Config):
        """Options of Based."""

        @property
        def num_features(self) -> int:
            """Constant, linear and quadratic terms."""
            return 1 + self.head_k_dim + super().num_features

    cfg: Config

    def short(self, x: Tensor, w: dict[str, Tensor]) -> Tensor:
        """As projected."""
        return x

    def features(self, short: Tensor) -> Tensor:
        """Constant, linear and quadratic terms."""
        linear = widen(short) * short.shape[-1] ** -0.25
        squares, pairs = second_order(linear)
        return torch.cat([torch.ones_like(linear[..., :1]), linear, squares * 0.5**0.5, pairs], dim=-1)

    def weights(self, products: Tensor) -> Tensor:
        """``1 + s + s^2 / 2``."""
        s = products * self.cfg.head_k_dim**-0.5
        return 1 + s + s.square() / 2

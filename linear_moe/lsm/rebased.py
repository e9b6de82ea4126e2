"""ReBased: linear attention whose weights are squares, of short queries and keys with a learned norm.

    y = gamma LayerNorm(x) + beta                  the same gamma, beta [K] for q, k and all heads
    phi(y) = [y_i^2 / sqrt(K), y_i y_j sqrt(2 / K) for i < j]     phi(q) . phi(k) = (q . k)^2 / K
    S_t = S_{t-1} + phi(k_t) v_t^T
    o_t = S_t^T phi(q_t) / (phi(q_t) . sum_{s <= t} phi(k_s) + eps)

Weights are squares, so a first token reads ``w / (w + eps)`` of its value: a notch of width sqrt(eps) in q . k, which
bfloat16 queries and keys do not resolve at 1e-5. Its gradient there is large (to 1 / sqrt(eps)) and that of the nearest
rounded q . k; ``eps`` of 0.01 is smooth. A mixture has such a token in every memory.

Letters: B runs, T tokens, H heads, K channels of a query or key, V value dim; phi has K (K + 1) / 2 channels.
Source: arXiv:2402.10644, section 4. As in the common library: 16 channels, no output norm and no gate, one gamma and
beta for queries and keys (the paper has one for each); eps is that of its parallel form (its chunked form has 1e-10).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.lsm.feature_maps import second_order
from linear_moe.lsm.mixer import Parameter
from linear_moe.lsm.quadratic import QuadraticAttention
from linear_moe.lsm.registry import register
from linear_moe.lsm.tables import widen


@register("rebased")
class ReBased(QuadraticAttention):
    """One matrix memory per head, of the values by the products of the keys' channels."""

    source = "arXiv:2402.10644, section 4"

    @dataclass(kw_only=True)
    class Config(QuadraticAttention.Config):
        """Options of ReBased."""

        eps: float = 1e-5
        """Added to the sum of the weights. With 0.01 no gradient of a document's first token is large."""
        use_gamma: bool = True
        """Learned scale of every channel of q and k."""
        use_beta: bool = True
        """Learned shift of every channel of q and k."""
        normalize: bool = True
        """Layer norm of q and k before scale and shift; outputs are always divided by the sum of the weights."""

    cfg: Config

    def parameters(self) -> tuple[Parameter, ...]:
        """Scale and shift, shared by queries, keys and heads."""
        shape = (self.cfg.head_k_dim,)
        gamma = Parameter("gamma", shape, torch.nn.init.ones_, per_head=False)
        beta = Parameter("beta", shape, torch.nn.init.zeros_, per_head=False)
        return (*((gamma,) if self.cfg.use_gamma else ()), *((beta,) if self.cfg.use_beta else ()))

    def short(self, x: Tensor, w: dict[str, Tensor]) -> Tensor:
        """Normed, scaled and shifted, at least float32."""
        wide = widen(x)
        if self.cfg.normalize:
            wide = F.layer_norm(wide, (wide.shape[-1],), eps=1e-5)
        if self.cfg.use_gamma:
            wide = wide * widen(w["gamma"])
        if self.cfg.use_beta:
            wide = wide + widen(w["beta"])
        return wide

    def features(self, short: Tensor) -> Tensor:
        """Squares, and every product of two channels once."""
        squares, pairs = second_order(widen(short) * short.shape[-1] ** -0.25)
        return torch.cat([squares, pairs * 2**0.5], dim=-1)

    def weights(self, products: Tensor) -> Tensor:
        """``(q . k)^2 / K``."""
        return products.square() / self.cfg.head_k_dim

"""Feature maps of keys and queries: K channels of a head to K', one map for all heads.

    identity              x
    elu                   elu(x) + 1, that is exp(x) below 0                    arXiv:2006.16236, equation 7
    relu                  max(x, 0)
    swish                 x sigmoid(x)
    hedgehog              softmax([2 y, -2 y]), y = W x + b                     arXiv:2402.04347, section 4.2
    t2r                   max(W x, 0)                                           arXiv:2103.13076, section 2.2
    elementwise_product   (W1 x + b1) * (W2 x + b2)
    dpfp                  y_i y_{i-j} for j = 1 .. 4, y = [max(x, 0), max(-x, 0)]   arXiv:2102.11174, section 5.3

As in the common library where it differs from the papers: hedgehog has a bias and a factor 2, t2r has no bias, dpfp
has 4 shifts. Learned maps start as torch's linear layers do, hedgehog's as the identity.

Letters: K key dim, K' mapped key dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.lsm.tables import Parameter, widen

Weights = dict[str, Tensor]
DPFP_SHIFTS = 4


@dataclass(frozen=True)
class FeatureMap:
    """A map of the last dimension.

    Attributes:
        apply: ``[..., K]`` and the weights by name to ``[..., K']``, in the dtype of the input.
        expansion: K' / K.
        matrices: names of learned matrices ``[K, K]``.
        biases: names of learned vectors ``[K]``.
        init_matrix: fills a matrix in place.
        init_bias: fills a bias in place.
        has_signs: whether channels may be negative, so that a sum of weights may be 0.
    """

    apply: Callable[[Tensor, Weights], Tensor]
    expansion: int = 1
    matrices: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    init_matrix: Callable[[Tensor], object] = torch.nn.init.eye_
    init_bias: Callable[[Tensor], object] = torch.nn.init.zeros_
    has_signs: bool = False

    def parameters(self, prefix: str, num_keys: int) -> tuple[Parameter, ...]:
        """The learned tensors, shared by all heads, as ``<prefix>_<name>``."""
        matrices = [(name, (num_keys, num_keys), self.init_matrix) for name in self.matrices]
        biases = [(name, (num_keys,), self.init_bias) for name in self.biases]
        return tuple(
            Parameter(f"{prefix}_{name}", shape, init, per_head=False)
            for name, shape, init in (*matrices, *biases)
        )

    def __call__(self, x: Tensor, w: Weights, prefix: str) -> Tensor:
        """Map ``x`` with the weights called ``<prefix>_<name>`` in ``w``."""
        names = (*self.matrices, *self.biases)
        return self.apply(x, {name: w[f"{prefix}_{name}"].to(x.dtype) for name in names})


class _EluPlusOne(torch.autograd.Function):
    """``exp(x)`` below 0 and ``x + 1`` above: ``F.elu(x) + 1`` rounds at 1, so nothing is left of -6 in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clamp(max=0).exp_().add_(x.relu())
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return y.clamp(max=1) * grad


def _hedgehog(x: Tensor, w: Weights) -> Tensor:
    y = 2 * widen(F.linear(x, w["weight"], w["bias"]))
    return torch.cat([y, -y], dim=-1).softmax(-1).to(x.dtype)


def _elementwise_product(x: Tensor, w: Weights) -> Tensor:
    return F.linear(x, w["weight1"], w["bias1"]) * F.linear(x, w["weight2"], w["bias2"])


def _dpfp(x: Tensor, w: Weights) -> Tensor:
    y = torch.cat([x.relu(), (-x).relu()], dim=-1)
    return torch.cat([y * y.roll(shift, -1) for shift in range(1, DPFP_SHIFTS + 1)], dim=-1)


def _init_linear(x: Tensor) -> None:
    """As ``torch.nn.Linear``: uniform within 1 / sqrt(K)."""
    bound = 1 / math.sqrt(x.shape[-1])
    x.uniform_(-bound, bound)


PLAIN: dict[str, FeatureMap] = {
    "identity": FeatureMap(lambda x, w: x, has_signs=True),
    "elu": FeatureMap(lambda x, w: _EluPlusOne.apply(x)),
    "relu": FeatureMap(lambda x, w: F.relu(x)),
    "swish": FeatureMap(lambda x, w: F.silu(x), has_signs=True),
}
"""Maps without weights that keep the width."""

FEATURE_MAPS: dict[str, FeatureMap] = PLAIN | {
    "hedgehog": FeatureMap(_hedgehog, 2, ("weight",), ("bias",)),
    "t2r": FeatureMap(
        lambda x, w: F.relu(F.linear(x, w["weight"])), matrices=("weight",), init_matrix=_init_linear
    ),
    "elementwise_product": FeatureMap(
        _elementwise_product,
        matrices=("weight1", "weight2"),
        biases=("bias1", "bias2"),
        init_matrix=_init_linear,
        init_bias=_init_linear,
        has_signs=True,
    ),
    "dpfp": FeatureMap(_dpfp, 2 * DPFP_SHIFTS),
}


def second_order(x: Tensor) -> tuple[Tensor, Tensor]:
    """Squares ``[..., K]`` and every product of two channels once, ``[..., K (K - 1) / 2]``, at distances 1, 2, ..

    Cyclic windows instead of a gather: its gradient would add with atomics.
    """
    num_keys = x.shape[-1]
    windows = torch.cat([x, x[..., : num_keys // 2]], dim=-1).unfold(-1, num_keys, 1)
    products = (x.unsqueeze(-2) * windows).flatten(-2)
    return products[..., :num_keys], products[..., num_keys : num_keys * (num_keys + 1) // 2]

"""HGRN2: a gated linear RNN whose forget gates are the keys, and forget less the deeper the layer.

    S_t = diag(a_t) S_{t-1} + (1 - a_t) i_t^T      a_t = b_l + (1 - b_l) sigmoid(W_f x_t)
    o_t = K^-1/2 S_t^T swish(q_t)                  b_l = p_1 + .. + p_l, p = softmax over layers of a table, b_0 = 0

Letters: B rows, T tokens, H heads here, K key dim, V value dim, L layers of this mixer in the model, l index of this
one among them, from 0.
Source: arXiv:2404.07904, section 3; lower bounds of the gates: arXiv:2311.04823, section 3. As in the common library:
128 channels per head, swish of q alone, a read scaled by K^-1/2, an RMS norm over the full width, no output gate, and
no activation in the optional short convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.kernels import bounded_decay_of
from linear_moe.lsm.mixer import Mixer, Parameter, Placement, Projection
from linear_moe.lsm.options import check_given, heads_in, one_of, positive
from linear_moe.lsm.recurrence import DiagonalDecay
from linear_moe.lsm.registry import register
from linear_moe.lsm.tables import widen


@register("hgrn2")
class HGRN2(DiagonalDecay):
    """One matrix memory per head, with a decay per key channel that is bounded from below by depth."""

    source = "arXiv:2404.07904, section 3"
    conv_activation = None

    @dataclass(kw_only=True)
    class Config(Mixer.Config):
        """Options of HGRN2; in a model it has heads of its own, not those of the softmax layers."""

        expand_ratio: int = 128
        """``head_dim`` in a model: its heads are ``hidden_size / expand_ratio``."""
        qkv_bias: bool = False
        """Learned bias on q, f and i (Qwen2)."""
        conv_size: int = 0
        """Width of the causal short convolution on q, f and i, without activation; 0: none."""
        output_norm: str = "rmsnorm"
        """Norm of the output over the full width: rmsnorm or identity."""
        output_gate: str = "none"
        """Activation of the output gate: swish, sigmoid or none."""

        @classmethod
        def from_model(
            cls, *, hidden_size: int, num_heads: int, head_dim: int, **options: Any
        ) -> HGRN2.Config:
            """As many heads of ``expand_ratio`` as ``hidden_size`` channels make."""
            check_given(cls, options)
            head_dim = options.get("expand_ratio", cls.expand_ratio)
            num_heads = heads_in(hidden_size, "expand_ratio", head_dim)
            return cls(hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim, **options)

        def __post_init__(self) -> None:
            super().__post_init__()
            one_of("output_norm", self.output_norm, ("rmsnorm", "identity"))
            positive("expand_ratio", self.expand_ratio, "a head has that many channels", 128)

    cfg: Config

    def projections(self) -> tuple[Projection, ...]:
        """Queries q, logits f of the forget gates and inputs i."""
        return self.qkv("qfi")

    def parameters(self) -> tuple[Parameter, ...]:
        """The table of lower bounds, of all layers of this mixer in one: equal steps to start with."""
        shape = (self.cfg.num_heads, self.cfg.layers_of_kind, self.cfg.head_k_dim)
        zeros = torch.nn.init.zeros_
        return (Parameter("lower_bounds", shape, zeros, keep_float32=True, per_model=True),)

    def gates(self, p: dict[str, Tensor], w: dict[str, Tensor], place: Placement) -> dict[str, Tensor]:
        """The log decay in float32, and keys of what it leaves."""
        bound_HK = _logit_of_bound(widen(w["lower_bounds"]), place.layer_of_kind)
        k_BTHK, log_decay_BTHK = bounded_decay_of(p["f"], bound_HK)
        return {"q": F.silu(p["q"]), "k": k_BTHK, "v": p["i"], "log_decay": log_decay_BTHK}

    @property
    def num_norm_groups(self) -> int:
        """One norm over the full width."""
        return 1


def _logit_of_bound(table_HLK: Tensor, layer: int) -> Tensor:
    """log b - log(1 - b) of one layer, ``[H, K]``: both are sums of rows of the softmax, so neither cancels."""
    log_p_HLK = F.log_softmax(table_HLK, dim=1)
    rest_HLK = torch.cat([log_p_HLK[:, :1], log_p_HLK[:, layer + 1 :]], dim=1)
    return log_p_HLK[:, 1 : layer + 1].logsumexp(dim=1) - rest_HLK.logsumexp(dim=1)

"""Cases of mixers that replace what a key held, against layers of flash-linear-attention."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.oracle.exchange import Case, Weights, heads, named
from tests.oracle.fla_decay import HEADS, HIDDEN, QKV, SHAPE, convolution
from tests.oracle.fla_in_torch import fla, in_torch

DECAY = {"A_log": "A_log", "dt_bias": "dt_bias"}


def common(layer: nn.Module, conv: bool, gate: bool) -> Weights:
    """What all of the family have."""
    return (
        named(layer, **QKV, norm_weight="o_norm.weight", **({"g": "g_proj.weight"} if gate else {}))
        | ({"b": layer.b_proj.weight} if getattr(layer, "use_beta", True) else {})
        | ({"conv_weight": convolution(layer)} if conv else {})
    )


def deltanet(**options: Any) -> Case:
    """Its only output gate is swish."""
    conv, gate = options.get("use_short_conv", True), options.get("use_gate", False)
    ours = {name: options[name] for name in ("qk_norm", "use_beta", "allow_neg_eigval") if name in options}
    return Case(
        "deltanet",
        lambda: fla.layers.DeltaNet(hidden_size=HIDDEN, num_heads=HEADS, **options),
        lambda layer: common(layer, conv, gate),
        SHAPE | ours | {"conv_size": 4 if conv else 0, "output_gate": "swish" if gate else "none"},
        context=in_torch,
    )


def gated_deltanet(**options: Any) -> Case:
    conv, gate = options.get("use_short_conv", True), options.get("use_gate", True)
    activation = options.get("output_gate_activation", "swish") if gate else "none"
    ours = {"expand_v": 2, "allow_neg_eigval": options.get("allow_neg_eigval", False)}
    return Case(
        "gated_deltanet",
        lambda: fla.layers.GatedDeltaNet(
            hidden_size=HIDDEN, num_heads=HEADS, head_dim=HIDDEN // HEADS, expand_v=2, **options
        ),
        lambda layer: common(layer, conv, gate) | named(layer, a="a_proj.weight", **DECAY),
        SHAPE | ours | {"conv_size": 4 if conv else 0, "output_gate": activation},
        context=in_torch,
    )


def kda(**options: Any) -> Case:
    """Its bias of the decay is one vector over all heads."""
    conv, bound = options.get("use_short_conv", True), options.get("lower_bound")
    low_rank = {
        "f.down": "f_proj.0.weight",
        "f.up": "f_proj.1.weight",
        "g.down": "g_proj.0.weight",
        "g.up": "g_proj.1.weight",
        "g.bias": "g_proj.1.bias",
    }
    ours = {"expand_v": 2, "allow_neg_eigval": options.get("allow_neg_eigval", False)}
    return Case(
        "kda",
        lambda: fla.layers.KimiDeltaAttention(
            hidden_size=HIDDEN, num_heads=HEADS, head_dim=HIDDEN // HEADS, expand_v=2, **options
        ),
        lambda layer: (
            common(layer, conv, gate=False)
            | named(layer, **low_rank, A_log="A_log")
            | {"dt_bias": heads(layer.dt_bias, HEADS)}
        ),
        SHAPE | ours | {"conv_size": 4 if conv else 0, "lower_bound": bound},
        context=in_torch,
    )


CASES = {
    "deltanet": deltanet(),
    "deltanet-gate": deltanet(use_gate=True),
    "deltanet-no_conv": deltanet(use_short_conv=False),
    "deltanet-negative": deltanet(allow_neg_eigval=True),
    "deltanet-no_beta": deltanet(use_beta=False),
    "deltanet-sum_norm": deltanet(qk_norm="sum"),
    "gated_deltanet": gated_deltanet(),
    "gated_deltanet-negative": gated_deltanet(allow_neg_eigval=True),
    "gated_deltanet-no_conv": gated_deltanet(use_short_conv=False),
    "gated_deltanet-no_gate": gated_deltanet(use_gate=False),
    "gated_deltanet-sigmoid": gated_deltanet(output_gate_activation="sigmoid"),
    "kda": kda(),
    "kda-negative": kda(allow_neg_eigval=True),
    "kda-no_conv": kda(use_short_conv=False),
    "kda-bounded": kda(safe_gate=True, lower_bound=-2.0),
}

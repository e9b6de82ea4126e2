"""Our mixers against the layers of flash-linear-attention 0.6.0, in float64, with exchanged weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.oracle.exchange import Case, Weights, check, heads
from tests.oracle.fla_in_torch import fla, in_torch

HIDDEN, HEADS = 16, 2
SHAPE = {"hidden_size": HIDDEN, "num_heads": HEADS, "head_dim": HIDDEN // HEADS}


def named(layer: nn.Module, **names: str) -> Weights:
    """Ours = theirs."""
    return {ours: layer.get_parameter(theirs) for ours, theirs in names.items()}


def convolution(layer: nn.Module, names: str = "qkv") -> torch.Tensor:
    """One convolution over the channels of a head out of three over the heads of one projection."""
    weights = [getattr(layer, f"{name}_conv1d").weight.squeeze(1) for name in names]
    return torch.cat([heads(weight, HEADS) for weight in weights], dim=1)


QKV = {"q": "q_proj.weight", "k": "k_proj.weight", "v": "v_proj.weight", "out": "o_proj.weight"}


def linear_attention(**options):
    return Case(
        "linear_attention",
        lambda: fla.layers.LinearAttention(hidden_size=HIDDEN, num_heads=HEADS, **options),
        lambda layer: named(layer, **QKV, norm_weight="norm.weight"),
        SHAPE | {"feature_map": options["feature_map"], "output_gate": "none"},
        context=in_torch,
    )


def gla(**options):
    conv = options.get("use_short_conv", False)
    return Case(
        "gla",
        lambda: fla.layers.GatedLinearAttention(hidden_size=HIDDEN, num_heads=HEADS, **options),
        lambda layer: (
            named(layer, **QKV, g="g_proj.weight", norm_weight="g_norm_swish_gate.weight")
            | named(
                layer,
                **{"a.down": "gk_proj.0.weight", "a.up": "gk_proj.1.weight", "a.bias": "gk_proj.1.bias"},
            )
            | ({"conv_weight": convolution(layer)} if conv else {})
        ),
        SHAPE | {"conv_size": 4 if conv else 0, "gate_clamp_min": options.get("clamp_min")},
        context=in_torch,
    )


def gated_deltanet(**options):
    conv, gate = options.get("use_short_conv", True), options.get("use_gate", True)
    activation = options.get("output_gate_activation", "swish")
    return Case(
        "gated_deltanet",
        lambda: fla.layers.GatedDeltaNet(
            hidden_size=HIDDEN, num_heads=HEADS, head_dim=HIDDEN // HEADS, **{"expand_v": 2, **options}
        ),
        lambda layer: (
            named(layer, **QKV, a="a_proj.weight", b="b_proj.weight", A_log="A_log", dt_bias="dt_bias")
            | named(layer, norm_weight="o_norm.weight", **({"g": "g_proj.weight"} if gate else {}))
            | ({"conv_weight": convolution(layer)} if conv else {})
        ),
        SHAPE
        | {
            "expand_v": options.get("expand_v", 2),
            "conv_size": 4 if conv else 0,
            "allow_neg_eigval": options.get("allow_neg_eigval", False),
            "output_gate": activation if gate else "none",
        },
        context=in_torch,
    )


CASES = {
    "linear_attention-identity": linear_attention(feature_map="identity"),
    "linear_attention-elu": linear_attention(feature_map="elu"),
    "linear_attention-relu": linear_attention(feature_map="relu"),
    "gla": gla(),
    "gla-conv": gla(use_short_conv=True),
    "gla-clamp": gla(clamp_min=-0.05),
    "gated_deltanet": gated_deltanet(),
    "gated_deltanet-negative": gated_deltanet(allow_neg_eigval=True, expand_v=1),
    "gated_deltanet-no_conv": gated_deltanet(use_short_conv=False),
    "gated_deltanet-no_gate": gated_deltanet(use_gate=False),
    "gated_deltanet-sigmoid": gated_deltanet(output_gate_activation="sigmoid"),
}


@pytest.mark.parametrize("name", CASES)
def test_fla(name: str):
    check(CASES[name])

"""Cases of mixers whose memory fades or only adds, against layers of flash-linear-attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from linear_moe.lsm import Placement
from tests.oracle.exchange import Case, Weights, heads, named
from tests.oracle.fla_in_torch import fla, in_torch
from tests.oracle.mamba2_weights import mamba2_weights

HIDDEN, HEADS = 16, 2
SHAPE = {"hidden_size": HIDDEN, "num_heads": HEADS, "head_dim": HIDDEN // HEADS}
BARE = {"output_norm": "identity", "output_gate": "none"}
QKV = {"q": "q_proj.weight", "k": "k_proj.weight", "v": "v_proj.weight", "out": "o_proj.weight"}


def convolution(layer: nn.Module, names: str = "qkv") -> Tensor:
    """Convolutions over all heads of one projection each, to one over the channels of each head."""
    weights = [getattr(layer, f"{name}_conv1d").weight.squeeze(1) for name in names]
    return torch.cat([heads(weight, HEADS) for weight in weights], dim=1)


LEARNED_MAPS = {
    "hedgehog": {"weight": "layer.weight", "bias": "layer.bias"},
    "t2r": {"weight": "layer.weight"},
    "elementwise_product": {
        "weight1": "layer1.weight",
        "bias1": "layer1.bias",
        "weight2": "layer2.weight",
        "bias2": "layer2.bias",
    },
}


def linear_attention(feature_map: str, **options: bool) -> Case:
    """Divided by the sum of the weights, it adds 1e-10 to it and we 1e-6: here 1e-10 as well."""
    tied, normalize = options.get("tie_feature_map_qk", False), options.pop("normalize", False)

    def weights(layer: nn.Module) -> Weights:
        learned = {
            f"feature_map{'' if tied else '_' + side}_{ours}": f"feature_map_{side}.{theirs}"
            for ours, theirs in LEARNED_MAPS.get(feature_map, {}).items()
            for side in ("q" if tied else "qk")
        }
        return named(layer, **QKV, **learned, norm_weight="norm.weight")

    return Case(
        "linear_attention",
        lambda: fla.layers.LinearAttention(
            hidden_size=HIDDEN,
            num_heads=HEADS,
            feature_map=feature_map,
            do_feature_map_norm=normalize,
            **options,
        ),
        weights,
        SHAPE | {"feature_map": feature_map, "output_gate": "none", "normalize": normalize} | options,
        changes={"normalizer_eps": 1e-10} if normalize else {},
        context=in_torch,
    )


def gla(**options: Any) -> Case:
    conv = options.get("use_short_conv", False)
    gate = {"a.down": "gk_proj.0.weight", "a.up": "gk_proj.1.weight", "a.bias": "gk_proj.1.bias"}
    return Case(
        "gla",
        lambda: fla.layers.GatedLinearAttention(hidden_size=HIDDEN, num_heads=HEADS, **options),
        lambda layer: (
            named(layer, **QKV, **gate, g="g_proj.weight", norm_weight="g_norm_swish_gate.weight")
            | ({"conv_weight": convolution(layer)} if conv else {})
        ),
        SHAPE | {"conv_size": 4 if conv else 0, "gate_clamp_min": options.get("clamp_min")},
        context=in_torch,
    )


def retention(xpos: bool = False, **options: Any) -> Case:
    """The layer has no xPos, but its rotary module does."""

    def build() -> nn.Module:
        layer = fla.layers.MultiScaleRetention(hidden_size=HIDDEN, num_heads=HEADS, **options)
        if xpos:
            layer.rotary = fla.modules.RotaryEmbedding(layer.head_k_dim, scale_base=512)
        return layer

    conv = options.get("use_short_conv", False)
    return Case(
        "retention",
        build,
        lambda layer: (
            named(layer, **QKV, g="g_proj.weight", norm_weight="g_norm_swish_gate.weight")
            | ({"conv_weight": convolution(layer)} if conv else {})
        ),
        SHAPE | {"expand_v": 2, "conv_size": 4 if conv else 0, "rotary": "xpos" if xpos else "rope"},
        context=in_torch,
    )


def gsa(**options: Any) -> Case:
    slots, conv = 5, options.get("use_short_conv", False)
    return Case(
        "gsa",
        lambda: fla.layers.GatedSlotAttention(
            hidden_size=HIDDEN, num_heads=HEADS, num_slots=slots, layer_idx=0, **options
        ),
        lambda layer: (
            named(layer, **QKV, f="f_proj.weight")
            | {"norm_weight": heads(layer.g_norm.weight, HEADS)}
            | ({"conv_weight": convolution(layer)} if conv else {})
        ),
        SHAPE | {"num_slots": slots, "conv_size": 4 if conv else 0},
        context=in_torch,
    )


class BoundedHGRN2(nn.Module):
    """The library's layer with the lower bounds that its model computes for all layers."""

    def __init__(self, number: int, num_layers: int, **options: Any) -> None:
        super().__init__()
        self.number = number
        self.lower_bounds = nn.Parameter(torch.zeros(num_layers, HIDDEN))
        self.layer = fla.layers.HGRN2Attention(
            hidden_size=HIDDEN, num_heads=HEADS, expand_ratio=HIDDEN // HEADS, layer_idx=number, **options
        )

    def forward(self, x: Tensor) -> Tensor:
        share = self.lower_bounds.softmax(0)
        return self.layer(x, lower_bound=(share.cumsum(0) - share[0])[self.number])[0]


def hgrn2(number: int, **options: Any) -> Case:
    num_layers, conv = 3, options.get("use_short_conv", False)
    projections = {"q": "q_proj", "f": "f_proj", "i": "i_proj", "out": "o_proj"}

    def weights(layer: nn.Module) -> Weights:
        bounds_HLK = layer.lower_bounds.unflatten(1, (HEADS, -1)).transpose(0, 1)
        return (
            named(layer.layer, **{ours: f"{theirs}.weight" for ours, theirs in projections.items()})
            | {"lower_bounds": bounds_HLK, "norm_weight": heads(layer.layer.g_norm.weight, HEADS)}
            | ({"conv_weight": convolution(layer.layer, "qfi")} if conv else {})
        )

    return Case(
        "hgrn2",
        lambda: BoundedHGRN2(number, num_layers, **options),
        weights,
        SHAPE | {"layers_of_kind": num_layers, "conv_size": 4 if conv else 0},
        run=lambda layer, x: layer(x),
        place=Placement(HEADS, layer=number, num_layers=num_layers, layer_of_kind=number),
        context=in_torch,
        unused=frozenset({"lower_bounds"} if number == 0 else ()),
    )


def mamba2() -> Case:
    """With one group of heads: with more, its torch path gives heads the wrong group (transformers': the right one)."""
    state, num_heads = 6, 4
    return Case(
        "mamba2",
        lambda: fla.layers.Mamba2(hidden_size=HIDDEN, head_dim=8, state_size=state, num_heads=num_heads),
        lambda layer: mamba2_weights(layer, num_heads, 1, state),
        {"hidden_size": HIDDEN, "num_heads": num_heads, "head_dim": 8, "state_size": state},
        context=in_torch,
    )


class Lightning(nn.Module):
    """A layer around the library's lightning attention, which has none: its operator computes the decays."""

    LAYER, NUM_LAYERS = 1, 4

    def __init__(self) -> None:
        super().__init__()
        for name in "qkvgo":
            setattr(self, f"{name}_proj", nn.Linear(HIDDEN, HIDDEN, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        projected = (getattr(self, f"{name}_proj")(x) for name in "qkvg")
        q, k, v, g = (rearrange(y, "b t (h d) -> b t h d", h=HEADS) for y in projected)
        o, _ = fla.ops.lightning_attn.chunk.chunk_lightning_attn(
            F.silu(q), F.silu(k), v, self.LAYER, self.NUM_LAYERS, scale=q.shape[-1] ** -0.5
        )
        return self.o_proj(rearrange(o * F.silu(g), "b t h d -> b t (h d)"))


def lightning() -> Case:
    return Case(
        "lightning_attention",
        Lightning,
        lambda layer: named(layer, **QKV, g="g_proj.weight"),
        SHAPE | {"output_norm": "identity"},
        run=lambda layer, x: layer(x),
        place=Placement(HEADS, layer=Lightning.LAYER, num_layers=Lightning.NUM_LAYERS),
        context=in_torch,
    )


def based(mode: str, eps: float) -> Case:
    return Case(
        "based",
        lambda: fla.layers.BasedLinearAttention(HIDDEN, 5, HEADS, HEADS, mode=mode),
        lambda layer: named(layer, **QKV),
        SHAPE | {"feature_dim": 5, "eps": eps},
        run=lambda layer, x: layer(x),
        context=in_torch,
    )


def rebased(mode: str, eps: float, **options: bool) -> Case:
    learned = [name for name in ("gamma", "beta") if options.get(f"use_{name}", True)]
    return Case(
        "rebased",
        lambda: fla.layers.ReBasedLinearAttention(
            HIDDEN, feature_dim=6, num_heads=HEADS, num_key_value_heads=HEADS, mode=mode, **options
        ),
        lambda layer: named(layer, **QKV, **{name: f"feature_map.{name}" for name in learned}),
        SHAPE | {"feature_dim": 6, "eps": eps} | options,
        run=lambda layer, x: layer(x),
        context=in_torch,
    )


CASES = {
    "linear_attention-identity": linear_attention("identity"),
    "linear_attention-elu": linear_attention("elu"),
    "linear_attention-relu": linear_attention("relu"),
    "linear_attention-hedgehog": linear_attention("hedgehog"),
    "linear_attention-t2r": linear_attention("t2r"),
    "linear_attention-elementwise_product": linear_attention("elementwise_product"),
    "linear_attention-dpfp": linear_attention("dpfp"),
    "linear_attention-tied": linear_attention("hedgehog", tie_feature_map_qk=True),
    "linear_attention-normalized": linear_attention("elu", normalize=True),
    "linear_attention-norm_qk": linear_attention("elu", norm_q=True, norm_k=True),
    "lightning_attention": lightning(),
    "gla": gla(),
    "gla-conv": gla(use_short_conv=True),
    "gla-clamp": gla(clamp_min=-0.05),
    "retention": retention(),
    "retention-conv": retention(use_short_conv=True),
    "retention-xpos": retention(xpos=True),
    "gsa": gsa(),
    "gsa-conv": gsa(use_short_conv=True),
    "hgrn2-first": hgrn2(0),
    "hgrn2-later": hgrn2(1),
    "hgrn2-conv": hgrn2(2, use_short_conv=True),
    "mamba2": mamba2(),
    "based-parallel": based("parallel", eps=1e-6),
    "based-chunk": based("chunk", eps=1e-10),
    "rebased-parallel": rebased("parallel", eps=1e-5),
    "rebased-chunk": rebased("chunk", eps=1e-10),
    "rebased-no_norm": rebased("parallel", eps=1e-5, normalize=False),
    "rebased-no_beta": rebased("parallel", eps=1e-5, use_beta=False),
    "rebased-bare": rebased("parallel", eps=1e-5, use_beta=False, use_gamma=False),
}

"""Cases of mixers that read a token and the one before it, against layers of flash-linear-attention."""

from __future__ import annotations

from torch import Tensor, nn

from linear_moe.lsm import Placement
from tests.oracle.exchange import Case, Weights, heads, named
from tests.oracle.fla_decay import HEADS, HIDDEN, SHAPE
from tests.oracle.fla_in_torch import fla, in_torch


def per_head(layer: nn.Module, *names: str) -> list[Tensor]:
    """Parameters over all channels, by head."""
    return [heads(layer.get_parameter(name).flatten(), HEADS) for name in names]


def rwkv6() -> Case:
    rank = 3
    projections = {"q": "r", "k": "k", "v": "v", "g": "g"}
    decay = {"w.down": "lora.0.weight", "w.up": "lora.2.weight", "w.bias": "lora.2.bias"}

    def weights(layer: nn.Module) -> Weights:
        scale, shift = per_head(layer, "g_norm.weight", "g_norm.bias")
        up_DC = layer.x_proj[2].weight
        return (
            named(layer, **{ours: f"{theirs}_proj.linear.weight" for ours, theirs in projections.items()})
            | named(layer, **{ours: f"w_proj.linear.{theirs}" for ours, theirs in decay.items()})
            | named(
                layer, x_mu="x_proj.0.mu", x_down="x_proj.0.linear.weight", x_bias="x_bias", bonus="bonus"
            )
            | {
                "x_up": up_DC.unflatten(1, (5, rank)).transpose(0, 1),
                "norm_weight": scale,
                "norm_bias": shift,
            }
            | {"out": layer.o_proj.weight}
        )

    return Case(
        "rwkv6",
        lambda: fla.layers.RWKV6Attention(
            hidden_size=HIDDEN, num_heads=HEADS, proj_low_rank_dim=rank, gate_low_rank_dim=5
        ),
        weights,
        SHAPE | {"shift_rank": rank, "decay_rank": 5},
        context=in_torch,
    )


def rwkv7(number: int) -> Case:
    """Its fused form, with an epsilon of 1e-6 under the root of the unit keys; the other one has 1e-12 outside."""
    ranks = {"w": 3, "a": 5, "v": 4, "g": 6}

    def weights(layer: nn.Module) -> Weights:
        found = {"q": layer.r_proj.weight, "k": layer.k_proj.weight, "v": layer.v_proj.weight}
        found |= {
            name: layer.get_parameter(name).flatten() for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")
        }
        per_channel = per_head(layer, "k_k", "k_a", "r_k", "g_norm.weight", "g_norm.bias")
        found |= zip(("k_k", "k_a", "r_k", "norm_weight", "norm_bias"), per_channel, strict=True)
        for ours, theirs in {"w": "w", "a": "a", "mix": "v", "g": "g"}.items():
            if number == 0 and theirs == "v":
                continue
            lora = getattr(layer, f"{theirs}_lora").lora
            found |= {f"{ours}.down": lora[0].weight, f"{ours}.up": lora[2].weight}
            found |= {f"{ours}.bias": lora[2].bias} if theirs != "g" else {}
        return found | {"out": layer.o_proj.weight}

    def run(layer: nn.Module, x: Tensor, first: Tensor | None = None) -> Tensor:
        return layer(x, v_first=first)[0]

    return Case(
        "rwkv7",
        lambda: fla.layers.RWKV7Attention(
            hidden_size=HIDDEN,
            num_heads=HEADS,
            head_dim=None,
            decay_low_rank_dim=ranks["w"],
            a_low_rank_dim=ranks["a"],
            v_low_rank_dim=ranks["v"],
            gate_low_rank_dim=ranks["g"],
            layer_idx=number,
            num_hidden_layers=3,
            fuse_norm=True,
        ),
        weights,
        SHAPE
        | {
            "decay_rank": ranks["w"],
            "iclr_rank": ranks["a"],
            "value_rank": ranks["v"],
            "gate_rank": ranks["g"],
        },
        run=run,
        has_first=number > 0,
        place=Placement(HEADS, layer=number, num_layers=3, layer_of_kind=number),
        context=in_torch,
    )


CASES = {"rwkv6": rwkv6(), "rwkv7-first": rwkv7(0), "rwkv7-later": rwkv7(1)}

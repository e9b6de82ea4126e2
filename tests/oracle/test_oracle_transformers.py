"""Our mixers against the layers of Hugging Face transformers, in float64, with exchanged weights.

The library has no RWKV6 or RWKV7: its ``rwkv`` is version 4, whose state is a vector, which none of our mixers is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.kimi_linear import configuration_kimi_linear, modeling_kimi_linear
from transformers.models.mamba2 import configuration_mamba2, modeling_mamba2
from transformers.models.minimax import configuration_minimax, modeling_minimax
from transformers.models.olmo_hybrid import configuration_olmo_hybrid, modeling_olmo_hybrid
from transformers.models.qwen3_next import configuration_qwen3_next, modeling_qwen3_next

from linear_moe.lsm import Placement
from tests.oracle.double import in_double
from tests.oracle.exchange import Case, Weights, check, heads, named
from tests.oracle.mamba2_weights import mamba2_weights

HIDDEN, HEADS = 16, 2
SHAPE = {"hidden_size": HIDDEN, "num_heads": HEADS, "head_dim": HIDDEN // HEADS}


@contextmanager
def in_torch(modeling: ModuleType) -> Iterator[None]:
    """Without the kernels that transformers takes from flash-linear-attention when that is installed."""
    with ExitStack() as stack:
        for name, function in vars(modeling).items():
            here = getattr(function, "__module__", None) == modeling.__name__
            if here and hasattr(function, "__wrapped__"):
                stack.enter_context(mock.patch.object(modeling, name, function.__wrapped__))
        stack.enter_context(in_double())
        yield


def split_heads(weight: torch.Tensor, *names: tuple[str, int]) -> Weights:
    """Projections out of one that is laid out head by head, as ours are."""
    parts = heads(weight, HEADS).split([width for _, width in names], dim=1)
    return {name: part.flatten(0, 1) for (name, _), part in zip(names, parts, strict=True)}


def convolution(weight: torch.Tensor, *widths: int) -> torch.Tensor:
    """``[channels, 1, width]``, all heads of q, of k, of v, to ours: q, k, v of each head."""
    parts = weight.squeeze(1).split([HEADS * width for width in widths])
    return torch.cat([heads(part, HEADS) for part in parts], dim=1)


def qwen3_next(memories: int = 1) -> Case:
    """``Qwen3NextGatedDeltaNet`` with that many value heads for each key head; its eps is 1e-6."""
    key, value = 8, 12
    config = configuration_qwen3_next.Qwen3NextConfig(
        hidden_size=HIDDEN,
        linear_num_value_heads=HEADS * memories,
        linear_num_key_heads=HEADS,
        linear_key_head_dim=key,
        linear_value_head_dim=value,
    )
    values = memories * value

    def weights(layer: nn.Module) -> Weights:
        qkvz = split_heads(layer.in_proj_qkvz.weight, ("q", key), ("k", key), ("v", values), ("g", values))
        return (
            qkvz
            | split_heads(layer.in_proj_ba.weight, ("b", memories), ("a", memories))
            | {"conv_weight": convolution(layer.conv1d.weight, key, key, values)}
            | {name: by_head(getattr(layer, name)) for name in ("A_log", "dt_bias")}
            | {"norm_weight": layer.norm.weight, "out": layer.out_proj.weight}
        )

    def by_head(x: torch.Tensor) -> torch.Tensor:
        return x if memories == 1 else x.unflatten(0, (HEADS, memories))

    return Case(
        "gated_deltanet",
        lambda: modeling_qwen3_next.Qwen3NextGatedDeltaNet(config, layer_idx=0),
        weights,
        SHAPE | {"expand_v": value / key, "norm_eps": config.rms_norm_eps, "values_per_key": memories},
        run=lambda layer, x: layer(x),
        context=lambda: in_torch(modeling_qwen3_next),
    )


def olmo_hybrid() -> Case:
    """``OlmoHybridGatedDeltaNet``: write strengths up to 2, and every projection for itself."""
    key, value = 8, 12
    config = configuration_olmo_hybrid.OlmoHybridConfig(
        hidden_size=HIDDEN,
        linear_num_value_heads=HEADS,
        linear_num_key_heads=HEADS,
        linear_key_head_dim=key,
        linear_value_head_dim=value,
        linear_allow_neg_eigval=True,
    )
    projections = {name: f"{name}_proj.weight" for name in "qkvabg"}

    def weights(layer: nn.Module) -> Weights:
        return named(
            layer,
            **projections,
            A_log="A_log",
            dt_bias="dt_bias",
            norm_weight="o_norm.weight",
            out="o_proj.weight",
        ) | {"conv_weight": convolution(layer.conv1d.weight, key, key, value)}

    return Case(
        "gated_deltanet",
        lambda: modeling_olmo_hybrid.OlmoHybridGatedDeltaNet(config, layer_idx=0),
        weights,
        SHAPE | {"expand_v": value / key, "allow_neg_eigval": True},
        run=lambda layer, x: layer(x),
        context=lambda: in_torch(modeling_olmo_hybrid),
    )


def kimi_linear() -> Case:
    """``KimiLinearDeltaAttention``: its output gate has no bias, ours has one (as flash-linear-attention's)."""
    config = configuration_kimi_linear.KimiLinearConfig(
        hidden_size=HIDDEN,
        linear_num_heads=HEADS,
        linear_head_dim=SHAPE["head_dim"],
        num_hidden_layers=1,
    )
    low_rank = {
        "f.down": "forget_gate.f_a_proj.weight",
        "f.up": "forget_gate.f_b_proj.weight",
        "g.down": "g_a_proj.weight",
        "g.up": "g_b_proj.weight",
    }
    projections = {name: f"{name}_proj.weight" for name in "qkvb"}

    def weights(layer: nn.Module) -> Weights:
        gate = layer.forget_gate
        return named(layer, **low_rank, **projections, norm_weight="o_norm.weight", out="o_proj.weight") | {
            "g.bias": torch.zeros(HIDDEN, dtype=torch.float64),
            "A_log": gate.A_log.flatten(),
            "dt_bias": heads(gate.dt_bias, HEADS),
            "conv_weight": convolution(layer.conv1d.weight, *[SHAPE["head_dim"]] * 3),
        }

    return Case(
        "kda",
        lambda: modeling_kimi_linear.KimiLinearDeltaAttention(config, layer_idx=0),
        weights,
        SHAPE | {"norm_eps": config.rms_norm_eps},
        run=lambda layer, x: layer(x),
        context=lambda: in_torch(modeling_kimi_linear),
    )


def mamba2(num_groups: int, limit: tuple[float, float] | None = None) -> Case:
    """``Mamba2Mixer``."""
    state, num_heads = 6, 4
    config = configuration_mamba2.Mamba2Config(
        hidden_size=HIDDEN,
        num_heads=num_heads,
        head_dim=8,
        state_size=state,
        n_groups=num_groups,
        chunk_size=16,
        **({"time_step_limit": limit} if limit else {}),
    )
    limits = {"dt_limit_min": limit[0], "dt_limit_max": limit[1]} if limit else {}
    return Case(
        "mamba2",
        lambda: modeling_mamba2.Mamba2Mixer(config, layer_idx=0),
        lambda layer: mamba2_weights(layer, num_heads, num_groups, state),
        {"hidden_size": HIDDEN, "num_heads": num_heads, "head_dim": 8, "state_size": state}
        | {"num_groups": num_groups, "norm_eps": config.layer_norm_epsilon}
        | limits,
        run=lambda layer, x: layer(x),
        context=lambda: in_torch(modeling_mamba2),
    )


class HeadNorm(nn.Module):
    """``MiniMaxRMSNorm`` over each head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = modeling_minimax.MiniMaxRMSNorm(width)

    def forward(self, o: torch.Tensor) -> torch.Tensor:
        return self.norm(o.unflatten(-1, (HEADS, -1))).flatten(-2)


class QueryKeyActivation(nn.Module):
    """SiLU of the queries and keys of every head."""

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = qkv.unflatten(-1, (HEADS, 3, -1)).unbind(-2)
        return torch.stack([F.silu(q), F.silu(k), v], dim=-2).flatten(-3)


def minimax() -> Case:
    """``MiniMaxLightningAttention``, changed where ours differs by design: a norm per head, and no SiLU on values.

    It does not scale the queries by K^-1/2. The norm takes that out again but for its epsilon, which is K times ours.
    """
    head_dim, number, depth = SHAPE["head_dim"], 2, 5
    config = configuration_minimax.MiniMaxConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        head_dim=head_dim,
        num_hidden_layers=depth,
        block_size=32,
    )

    def build() -> nn.Module:
        layer = modeling_minimax.MiniMaxLightningAttention(config, layer_idx=number)
        layer.norm, layer.act_fn = HeadNorm(head_dim), QueryKeyActivation()
        return layer

    def weights(layer: nn.Module) -> Weights:
        qkv = split_heads(layer.qkv_proj.weight, *((name, head_dim) for name in "qkv"))
        return qkv | named(
            layer, g="output_gate.weight", norm_weight="norm.norm.weight", out="out_proj.weight"
        )

    return Case(
        "lightning_attention",
        build,
        weights,
        SHAPE | {"slopes": "alibi", "output_gate": "sigmoid", "norm_eps": 1e-6 / head_dim},
        run=lambda layer, x: layer(x, position_embeddings=None, attention_mask=None)[0],
        place=Placement(HEADS, layer=number, num_layers=depth),
        context=lambda: in_torch(modeling_minimax),
    )


CASES = {
    "gated_deltanet-qwen3_next": qwen3_next(),
    "gated_deltanet-qwen3_next-two_values": qwen3_next(2),
    "gated_deltanet-olmo_hybrid": olmo_hybrid(),
    "kda-kimi_linear": kimi_linear(),
    "lightning_attention-minimax": minimax(),
    "mamba2-one_group": mamba2(1),
    "mamba2-groups": mamba2(2),
    "mamba2-limits": mamba2(2, limit=(0.5, 1.5)),
}


@pytest.mark.parametrize("name", CASES)
def test_transformers(name: str):
    check(CASES[name])

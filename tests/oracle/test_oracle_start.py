"""What is not a projection starts as in flash-linear-attention: the same distribution, of many heads at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from linear_moe import lsm
from tests.oracle import fla_shift
from tests.oracle.exchange import named
from tests.oracle.fla_in_torch import fla, in_torch

MANY = 2000
SMALL = {"hidden_size": 16, "num_heads": 1, "head_dim": 16}
ONE = {"hidden_size": 8, "num_heads": MANY, "head_dim": 1}

DELTA = {"A_log": "A_log", "dt_bias": "dt_bias"}
STARTS: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "gated_deltanet": (
        lambda: fla.layers.GatedDeltaNet(**ONE, expand_v=1),
        DELTA | {"conv_weight": "q_conv1d.weight", "norm_weight": "o_norm.weight"},
    ),
    "deltanet": (
        lambda: fla.layers.DeltaNet(hidden_size=MANY, num_heads=MANY),
        {"conv_weight": "q_conv1d.weight"},
    ),
    "kda": (lambda: fla.layers.KimiDeltaAttention(**ONE), DELTA | {"conv_weight": "q_conv1d.weight"}),
    "mamba2": (
        lambda: fla.layers.Mamba2(hidden_size=8, head_dim=1, expand=MANY // 8, state_size=4),
        DELTA | {"D": "D", "norm_weight": "norm.weight"},
    ),
    "rebased": (
        lambda: fla.layers.ReBasedLinearAttention(16, num_heads=1, num_key_value_heads=1),
        {"gamma": "feature_map.gamma", "beta": "feature_map.beta"},
    ),
}


def largest_gap(one: Tensor, other: Tensor) -> float:
    """Between two empirical distribution functions (Kolmogorov and Smirnov)."""
    points = torch.cat([one, other]).sort().values
    below = [torch.searchsorted(x.sort().values, points, right=True) / x.numel() for x in (one, other)]
    return (below[0] - below[1]).abs().max().item()


@pytest.mark.parametrize("name", STARTS)
def test_starts(name: str):
    build, names = STARTS[name]
    torch.manual_seed(0)
    with in_torch():
        theirs = named(build(), **names)
    options = {} if name == "rebased" else ONE
    kind = lsm.get(name)
    tables = {table.name: table for table in kind(kind.Config(**(SMALL | options))).all_parameters()}
    for ours in names:
        drawn = torch.empty(tables[ours].shape, dtype=torch.float64)
        tables[ours].init(drawn)
        # chance makes it larger than that once in 1000 draws of 2000 numbers; the seed is fixed
        assert largest_gap(drawn.flatten(), theirs[ours].detach().double().flatten()) < 0.06, ours


def checkpoint_key(name: str) -> str:
    """Of a weight as cases name it, what ``Mixer.initialize`` calls it."""
    if name in ("q", "k", "v"):
        return f"in_proj.{name}"
    projection, _, part = name.partition(".")
    names = {"down": "down", "up": "up.weight", "bias": "up.bias"}
    return f"low_rank.{projection}.{names[part]}" if part else {"out": "out_proj.weight"}.get(name, name)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_rwkv7_starts(number: int):
    """All depends on the layer, nothing but directions on chance: matrices have the same singular values."""
    case = fla_shift.rwkv7(number)
    with in_torch():
        theirs = case.weights(case.build())
    kind = lsm.get("rwkv7")
    mixer = kind(kind.Config(**case.options))
    found = {checkpoint_key(name): torch.full(weight.shape, 9.0) for name, weight in theirs.items()}
    found |= {key: x.unflatten(0, (mixer.cfg.num_heads, -1)) for key, x in found.items() if "in_proj" in key}
    for table in mixer.all_parameters():
        table.init(found[table.name])
    mixer.initialize(found, case.place)
    for name, weight in theirs.items():
        ours, start = found[checkpoint_key(name)], weight.detach().float()
        if name in ("q", "k", "v") or name.endswith((".up", ".down")):
            ours, start = (torch.linalg.svdvals(x.reshape(weight.shape)) for x in (ours, start))
        assert torch.allclose(ours, start, atol=1e-5), name

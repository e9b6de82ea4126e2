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
from transformers.models.qwen3_next import configuration_qwen3_next, modeling_qwen3_next

from tests.oracle.double import in_double
from tests.oracle.exchange import Case, Weights, check, heads

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


def qwen3_next() -> Case:
    """``Qwen3NextGatedDeltaNet`` with as many value heads as key heads; its eps is 1e-6."""
    key, value = 8, 12
    config = configuration_qwen3_next.Qwen3NextConfig(
        hidden_size=HIDDEN,
        linear_num_value_heads=HEADS,
        linear_num_key_heads=HEADS,
        linear_key_head_dim=key,
        linear_value_head_dim=value,
    )

    def weights(layer: torch.nn.Module) -> Weights:
        qkvz = split_heads(layer.in_proj_qkvz.weight, ("q", key), ("k", key), ("v", value), ("g", value))
        return (
            qkvz
            | split_heads(layer.in_proj_ba.weight, ("b", 1), ("a", 1))
            | {"conv_weight": convolution(layer.conv1d.weight, key, key, value)}
            | {"A_log": layer.A_log, "dt_bias": layer.dt_bias, "norm_weight": layer.norm.weight}
            | {"out": layer.out_proj.weight}
        )

    return Case(
        "gated_deltanet",
        lambda: modeling_qwen3_next.Qwen3NextGatedDeltaNet(config, layer_idx=0),
        weights,
        SHAPE | {"expand_v": value / key, "norm_eps": config.rms_norm_eps},
        run=lambda layer, x: layer(x),
        context=lambda: in_torch(modeling_qwen3_next),
    )


CASES = {"gated_deltanet-qwen3_next": qwen3_next()}


@pytest.mark.parametrize("name", CASES)
def test_transformers(name: str):
    check(CASES[name])

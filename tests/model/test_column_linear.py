"""The column-parallel layer whose product adds the bias, against Megatron's and the formula, on one rank and on two."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from linear_moe.model.column_linear import ColumnLinear
from tests.workers import with_model_parallel

IN, OUT = 6, 8


class Named(TorchDispatchMode):
    """What torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def results(rank: int, world: int, kind: type, has_bias: bool) -> tuple[list[Tensor], bool]:
    """Output and gradients of this rank's columns; whether the bias was an operation of its own."""
    with with_model_parallel(tp=world):
        return of_rank(rank, world, kind, has_bias)


def of_rank(rank: int, world: int, kind: type, has_bias: bool) -> tuple[list[Tensor], bool]:
    """The same, within groups."""
    config = TransformerConfig(
        num_layers=1, hidden_size=IN, num_attention_heads=2, params_dtype=torch.float64, use_cpu_initialization=True,
        tensor_model_parallel_size=world,
    )  # fmt: skip
    layer = kind(
        IN, OUT, config=config, init_method=torch.nn.init.normal_, bias=has_bias, gather_output=False
    )
    generator = torch.Generator().manual_seed(0)
    weight, bias, x, dy = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((OUT, IN), (OUT,), (5, 2, IN), (5, 2, OUT))
    )
    layer.weight.data.copy_(weight.chunk(world)[rank])
    if has_bias:
        layer.bias.data.copy_(bias.chunk(world)[rank])
    with Named() as seen:
        y, left = layer(x.requires_grad_())
    assert left is None
    grads = torch.autograd.grad((y * dy.chunk(world, -1)[rank]).sum(), [x, *layer.parameters()])
    true = F.linear(x, weight, bias if has_bias else None)
    (dx,) = torch.autograd.grad((true * dy).sum(), x)
    torch.testing.assert_close(y, true.chunk(world, -1)[rank], rtol=0, atol=1e-12)
    torch.testing.assert_close(grads[0], dx, rtol=0, atol=1e-12)
    return [y.detach(), *grads], "add" in seen.names


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_megatrons_without_a_pass_for_the_bias(gloo, world, has_bias):
    ours, theirs = (gloo(world, results, kind, has_bias) for kind in (ColumnLinear, ColumnParallelLinear))
    for (found, adds), (expected, _) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert adds == (has_bias and world > 1)

"""Projections of a mixer's input beside the fused one: low rank, by groups of heads, token-shifted.

Letters: T local tokens, B batch, D hidden, H heads here, G groups of heads, W fused width, R tensor-parallel ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from linear_moe.lsm import Projection
from linear_moe.lsm.tables import WAISTS
from linear_moe.model.column_linear import ColumnLinear
from linear_moe.model.config import LinearMoEConfig


def whole_sequence(
    x_TBC: Tensor, config: LinearMoEConfig, tp_group: torch.distributed.ProcessGroup
) -> Tensor:
    """All tokens on every tensor-parallel rank, for use by its own heads: gradients are summed over the ranks."""
    if config.sequence_parallel:
        return gather_from_sequence_parallel_region(x_TBC, tensor_parallel_output_grad=True, group=tp_group)
    return copy_to_tensor_model_parallel_region(x_TBC, group=tp_group)


def wait_for(module: torch.nn.Module) -> None:
    """Have the weights of a module here that are read without calling it.

    The distributed optimizer sends weights around while the forward pass runs (``--overlap-param-gather``), and waits
    for those of a module in hooks on its call.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())


class LowRankLinear(MegatronModule):
    """hidden -> ``rank`` channels, replicated -> heads, column-parallel: a gate through a narrow waist."""

    def __init__(
        self,
        config: LinearMoEConfig,
        table: Projection,
        num_heads: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config)
        assert table.rank is not None
        self.waist = WAISTS[table.waist]
        # Replicated, and fed a slice of the sequence under sequence parallelism: Megatron sums such gradients.
        self.down = replicated((table.rank, config.hidden_size), config)
        self.up = ColumnLinear(
            table.rank,
            num_heads * table.width,
            config=config,
            init_method=config.init_method,
            bias=table.bias,
            gather_output=False,
            tp_group=pg_collection.tp,
        )

    def forward(self, hidden_TBD: Tensor) -> Tensor:
        """``[T, B, D]`` (``T / R`` under sequence parallelism) to ``[T, B, H * width]``."""
        out, _ = self.up(self.waist(F.linear(hidden_TBD, self.down.to(hidden_TBD.dtype))))
        return out

    def of_whole(self, hidden_BTD: Tensor, sum_gradients: bool) -> Tensor:
        """The same of :func:`whole_sequence`; ``sum_gradients`` of the replicated map when nobody else does."""
        wait_for(self)
        wait_for(self.up)
        down = self.down
        if sum_gradients:
            down = copy_to_tensor_model_parallel_region(down, group=self.up.tp_group)
        waist = self.waist(linear_time_first(hidden_BTD, down.to(hidden_BTD.dtype)))
        return linear_time_first(waist, self.up.weight, self.up.bias)


class GroupLinear(MegatronModule):
    """hidden -> groups of heads, the same on every tensor-parallel rank: a group may serve heads of several ranks."""

    def __init__(
        self, config: LinearMoEConfig, out_features: int, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config)
        self.tp_group = pg_collection.tp
        self.weight = replicated((out_features, config.hidden_size), config)

    def forward(self, hidden_TBD: Tensor) -> Tensor:
        """``[T, B, D]`` (``T / R`` under sequence parallelism) to ``[T, B, G * width]``, all groups."""
        out = F.linear(hidden_TBD, self.weight.to(hidden_TBD.dtype))
        return whole_sequence(out, self.config, self.tp_group)


def shifted(
    table: tuple[Projection, ...],
    weight: Tensor,
    biases: dict[str, Tensor],
    inputs: dict[str, Tensor],
    num_heads: int,
) -> dict[str, Tensor]:
    """The fused projections when each of them reads an input of its own.

    Args:
        table: the fused projections.
        weight: ``[H * W, D]``, laid out head by head.
        biases: ``[H, width]`` by name of the projection, of those that have one.
        inputs: ``[B, T, D]`` by name of the projection.
        num_heads: H.

    Returns:
        ``[B, T, H, width]`` by name of the projection.
    """
    weight_HWD = weight.unflatten(0, (num_heads, -1))
    parts = {}
    for p, part_HWD in zip(table, weight_HWD.split([p.width for p in table], dim=1), strict=True):
        bias = biases[p.name].flatten().to(weight.dtype) if p.name in biases else None
        out_BTC = linear_time_first(inputs[p.name], part_HWD.flatten(0, 1), bias)
        parts[p.name] = out_BTC.unflatten(-1, (num_heads, p.width))
    return parts


def linear_time_first(x_BTD: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``[B, T, out]``, both with tokens outside of rows in memory, as Megatron has them: so neither is copied."""
    return F.linear(x_BTD.transpose(0, 1), weight, bias).transpose(0, 1)


def replicated(shape: tuple[int, ...], config: LinearMoEConfig) -> torch.nn.Parameter:
    """A projection's weight of which every tensor-parallel rank holds a copy."""
    parameter = empty(shape, config.params_dtype)
    config.init_method(parameter.data)
    setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010
    return parameter


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.nn.Parameter:
    """A parameter on this rank's device, to be filled."""
    return torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=torch.cuda.current_device()))

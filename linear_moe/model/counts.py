"""Parameters of a model, counted where they are: in the built modules. It needs no memory for that.

A model that is built :func:`on_meta` has shapes and no values: the largest is counted as soon as its modules are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch.overrides import TorchFunctionMode

from linear_moe.model.builder import LinearMoEBuilder, LinearMoEModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of one whole model; what several layers share counts once."""

    total: int
    """All parameters."""
    active: int
    """Those that one token uses: all but the routed experts that it does not visit. All memories of a mixture of
    memories count, although a token reads and writes only some of them."""
    embedding: int
    """Tables of the vocabulary: input embedding and, unless it is the same one, output projection."""


def count_parameters(model: GPTModel) -> ParameterCounts:
    """Count a whole model of one process, on any device."""
    total, idle = _elements(model.parameters()), 0
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            routed, experts = _elements(layer.experts.parameters()), layer.config.num_moe_experts
            assert experts is not None and routed % experts == 0, "experts of one size, all in this process"
            idle += routed // experts * (experts - layer.config.moe_router_topk)
    vocabulary = [*model.embedding.parameters(), *model.output_layer.parameters()]
    return ParameterCounts(total, total - idle, _elements(vocabulary))


def build_on_meta(config: LinearMoEModelConfig) -> GPTModel:
    """The whole model with shapes and no values; process groups of one process come first."""
    return on_meta(
        lambda: LinearMoEBuilder(config).build_model(
            ProcessGroupCollection.use_mpu_process_groups(), pre_process=True, post_process=True
        )
    )


def on_meta[T](build: Callable[[], T]) -> T:
    """What ``build`` makes, with every tensor on the meta device, whatever device it asks for."""
    with torch.device("meta"), _MetaInstead():
        return build()


class _MetaInstead(TorchFunctionMode):
    """Megatron names the device of every weight, so that a default device alone changes nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _elements(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)

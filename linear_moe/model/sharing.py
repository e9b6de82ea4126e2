"""What the mixer layers of one model share: tables of the whole model, and the first layer's value.

Tables (HGRN2's bounds) have a copy on every pipeline stage; Megatron sums their gradients over the stages. The first
value (RWKV7) belongs to a micro-batch: later layers of a stage find it beside the hidden states, and on its way to the
next stage it rides behind them in the same message.

Letters: T tokens, t tokens of a hidden state (T over the tensor-parallel ranks under sequence parallelism), B batch,
D hidden, H heads here, V value dim.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from linear_moe import lsm
from linear_moe.lsm import Mixer
from linear_moe.model.config import LinearMoEConfig, mixer_config
from linear_moe.model.mixer_layer import FirstValue, MixerLayer
from linear_moe.model.mixer_parameters import ModelTables
from linear_moe.model.pattern import SOFTMAX


def share(
    model: GPTModel,
    stage_layers: list[int],
    pg_collection: ProcessGroupCollection,
    vp_stage: int | None = None,
) -> None:
    """Tie the mixer layers of one (virtual) pipeline stage to each other and to the other stages.

    Args:
        model: the stage, just built.
        stage_layers: global indices of its layers, from 0.
        pg_collection: process groups; ``tp`` and ``pp`` are used.
        vp_stage: which chunk of this rank it is.
    """
    config: LinearMoEConfig = model.config  # type: ignore[assignment]
    layers = [module for module in model.modules() if isinstance(module, MixerLayer)]
    copy = pg_collection.pp.rank() + pg_collection.pp.size() * (vp_stage or 0)
    for kind in sorted(set(config.layer_kinds) - {SOFTMAX}):
        mixer = lsm.get(kind)(mixer_config(kind, config))
        own = [layer for layer in layers if layer.mixer.name == kind]
        tables = _tables(model, mixer, config, pg_collection, copy, used=bool(own))
        value = FirstValue()
        for layer in own:
            layer.share(tables, value)
        if mixer.first_value is not None:
            heads = mixer.cfg.num_heads // pg_collection.tp.size()
            width = {p.name: p.width for p in mixer.fused_projections()}[mixer.first_value]
            _carry(model, value, (heads, width), *_crosses(config, kind, stage_layers))


def _tables(
    model: GPTModel,
    mixer: Mixer,
    config: LinearMoEConfig,
    pg_collection: ProcessGroupCollection,
    copy: int,
    used: bool,
) -> ModelTables | None:
    """The model's tables of a mixer, on this stage."""
    per_model = [table for table in mixer.all_parameters() if table.per_model]
    if not per_model:
        return None
    tables = ModelTables(config, per_model, pg_collection, copy)
    model.add_module(f"{mixer.name}_tables", tables)
    if not used:
        # Every stage takes part in the sum of gradients, and a parameter that got none would stall its bucket.
        model.decoder.register_forward_hook(lambda module, args, hidden: hidden + _zero(tables, hidden))
    return tables


def _zero(tables: ModelTables, hidden: Tensor) -> Tensor:
    return sum(0 * weight.sum() for weight in tables().values()).to(hidden.dtype)  # type: ignore[union-attr]


def _crosses(config: LinearMoEConfig, kind: str, stage_layers: list[int]) -> tuple[bool, bool]:
    """Whether the first value of a mixer enters a stage, and whether it leaves it."""
    of_kind = [i for i, name in enumerate(config.layer_kinds) if name == kind]
    first, last = of_kind[0], of_kind[-1]
    enters = bool(stage_layers) and first < stage_layers[0] <= last
    leaves = bool(stage_layers) and first <= stage_layers[-1] < last
    return enters, leaves


def _carry(model: GPTModel, value: FirstValue, shape_HV: tuple[int, int], enters: bool, leaves: bool) -> None:
    """Take the value out of the stage's input, and put it behind the stage's output."""
    if enters:
        receive, hidden_size = model.set_input_tensor, model.config.hidden_size

        def set_input_tensor(input_tensor: Any) -> None:
            message = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
            if message is None:
                return receive(input_tensor)
            hidden_tBD, behind_tBX = message.split([hidden_size, message.shape[-1] - hidden_size], dim=-1)
            value.receive(behind_tBX, shape_HV, model.config.params_dtype)
            return receive([hidden_tBD] if isinstance(input_tensor, list) else hidden_tBD)

        model.set_input_tensor = set_input_tensor  # type: ignore[method-assign]
    if leaves:
        model.decoder.register_forward_hook(
            lambda module, args, hidden_tBD: torch.cat([hidden_tBD, value.message(hidden_tBD)], dim=-1)
        )

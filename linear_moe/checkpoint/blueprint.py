"""What the checkpoint of a model holds - keys, shapes, dtypes - asked of the model itself, built without its weights.

Importing this module switches a machine without a CUDA device to the CPU platform.
"""

from __future__ import annotations

from linear_moe.training import cpu

if cpu.needed():
    cpu.activate()  # before Megatron looks for a device

from argparse import Namespace
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.overrides import TorchFunctionMode

from linear_moe import lsm
from linear_moe.checkpoint.tables import Shape
from linear_moe.inference.load import join_single_process
from linear_moe.inference.rebuild import single_process_arguments
from linear_moe.model.builder import LinearMoEBuilder, LinearMoEModelConfig
from linear_moe.model.config import mixer_config
from linear_moe.model.families import FAMILIES, Family, Llama3Rope, ModelSize, YarnRope
from linear_moe.model.pattern import SOFTMAX
from linear_moe.model.specs import moe_layers
from linear_moe.training import arguments

CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
"""Megatron's versioning of what a checkpoint holds."""


@dataclass(frozen=True)
class Blueprint:
    """A model of ours without its weights."""

    args: Namespace
    """Validated arguments of one process."""
    config: LinearMoEModelConfig
    """What it is built from."""
    tensors: dict[str, tuple[int, ...]]
    """Shape of every tensor of the checkpoint."""
    float32: frozenset[str]
    """Those that are float32, of a model in half precision those that stay it."""
    objects: dict[str, object]
    """What is not a tensor, by Megatron's unique key."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Mixer of every layer."""
        return tuple(self.config.transformer.layer_kinds)

    def shape(self, vocab_size: int) -> Shape:
        """What the tables need, for an embedding of ``vocab_size`` rows on the other side."""
        config = self.config.transformer
        names = sorted(set(self.kinds) - {SOFTMAX})
        assert config.num_query_groups is not None and config.kv_channels is not None
        return Shape(
            kinds=self.kinds,
            mixers={name: lsm.get(name)(mixer_config(name, config)) for name in names},
            groups=config.num_query_groups,
            channels=config.kv_channels,
            vocab_size=vocab_size,
            padded_vocab_size=self.args.padded_vocab_size,
        )


class _NoMemory(TorchFunctionMode):
    """Parameters take no memory: ``torch.empty`` makes ``meta`` tensors, wherever it was told to put them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs |= {"device": "meta", "pin_memory": False}
        return func(*args, **kwargs)


def blueprint(argv: list[str], *, padded_vocab_size: int) -> Blueprint:
    """The model of a command line.

    Raises:
        ValueError: a model that cannot be built, or more than one process.
    """
    args = single_process_arguments(argv, padded_vocab_size=padded_vocab_size)
    config = arguments.model_config(args)
    join_single_process(args.seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with _NoMemory():
        model = LinearMoEBuilder(config).build_model(groups, pre_process=True, post_process=True)
        state = model.sharded_state_dict(metadata=CONTENT | {"dp_cp_group": groups.dp_cp})
        apply_factories(state)
    tensors: dict[str, tuple[int, ...]] = {}
    float32, objects = set(), {}
    for value in nested_values(state):
        if isinstance(value, ShardedTensor):
            tensors[value.key] = tuple(value.global_shape)
            if value.dtype == torch.float32:
                float32.add(value.key)
        elif isinstance(value, ShardedObject):
            objects[value.unique_key] = value.data
    return Blueprint(args, config, tensors, frozenset(float32), objects)


def family_and_size(model: Blueprint) -> tuple[Family, ModelSize]:
    """What a model's arguments are in the words of the families.

    Raises:
        ValueError: a family that this version does not have.
    """
    args, transformer = model.args, model.config.transformer
    if args.family not in FAMILIES:
        raise ValueError(
            f"the run is of family {args.family!r}\n"
            f"  why: the families are {', '.join(FAMILIES)}\n"
            f"  try: the version of linear_moe that trained it"
        )
    renamed = {"norm_epsilon": "layernorm_epsilon"}
    names = {field.name for field in fields(ModelSize)}
    values: dict[str, Any] = {name: getattr(args, renamed.get(name, name), None) for name in names}
    moe = moe_layers(transformer)
    first_dense = moe.index(True) if True in moe else 0
    if args.num_experts is None:
        values |= {"moe_ffn_hidden_size": None, "moe_shared_expert_intermediate_size": None}
    if not args.multi_latent_attention:
        values |= {n: None for n in ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim")}
        values["v_head_dim"] = None
    values |= {
        "num_query_groups": transformer.num_query_groups
        if args.group_query_attention
        else args.num_attention_heads,
        "first_dense_layers": first_dense,
        "tie_embeddings": not args.untie_embeddings_and_output_weights,
        "fp32_residual": bool(args.fp32_residual_connection),
        "rope_scaling": _rope_scaling(args, transformer),
        "vocab_size": args.padded_vocab_size,
        "extra_vocab_size": 0,
        "source": "the arguments of a run",
    }
    size = ModelSize(**values)
    switches = {
        "add_qkv_bias": args.add_qkv_bias,
        "softmax_before_topk": args.moe_router_pre_softmax if args.num_experts else False,
        "shared_expert_gate": bool(args.moe_shared_expert_gate),
        "qk_norm": bool(args.qk_layernorm) and not args.multi_latent_attention,
        "zero_centered_norms": bool(args.layernorm_zero_centered_gamma),
        "rotary_percent": args.rotary_percent,
    }
    family = FAMILIES[args.family]
    return replace(family, **switches), size


def _rope_scaling(args: Namespace, transformer: Any) -> Llama3Rope | YarnRope | None:
    if args.multi_latent_attention:
        if args.rope_type != "yarn":
            return None
        factor, scale, scale_all = (
            getattr(transformer, name) for name in ("rotary_scaling_factor", "mscale", "mscale_all_dim")
        )
        return YarnRope(factor=factor, mscale=scale, mscale_all_dim=scale_all)
    return Llama3Rope(factor=args.rope_scaling_factor) if args.use_rope_scaling else None

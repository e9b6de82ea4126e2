"""The layers of a Qwen3-Next config.json and ours, in both directions. Imports neither torch nor Megatron.

``layer_types`` says which layers are softmax attention; the ``linear_*`` fields are the heads of all others, which are
gated DeltaNet. Ours have as many heads as softmax layers, with widths as multiples of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from linear_moe.model.pattern import SOFTMAX

if TYPE_CHECKING:
    from linear_moe.lsm.gated_delta_net import GatedDeltaNet

MIXER = "gated_deltanet"
TYPES = {"linear_attention": MIXER, "full_attention": SOFTMAX}
"""Our layer by ``layer_types``."""

DEFAULTS = {
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
"""What an absent field means."""


def layers_of(config: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mixer of every layer, and the options of gated DeltaNet as flags.

    Raises:
        ValueError: a type or a number of heads that our layers do not have.
    """
    kinds = _kinds(config)
    if MIXER not in kinds:
        return kinds, ()
    found = {name: config.get(name, default) for name, default in DEFAULTS.items()}
    heads, values = found["linear_num_key_heads"], found["linear_num_value_heads"]
    if heads != config["num_attention_heads"]:
        raise ValueError(
            f"config.json has linear_num_key_heads = {heads} and num_attention_heads = "
            f"{config['num_attention_heads']}\n"
            f"  why: a mixer has as many heads as the softmax layers here\n"
            f"  try: a model with the same number of both"
        )
    if values % heads:
        raise ValueError(
            f"config.json has linear_num_value_heads = {values} and linear_num_key_heads = {heads}\n"
            f"  why: every key serves the same number of values\n"
            f"  try: the config.json that belongs to the weights"
        )
    width = config["head_dim"]
    options = {
        "expand-k": found["linear_key_head_dim"] / width,
        "expand-v": found["linear_value_head_dim"] / width,
        "values-per-key": values // heads,
        "conv-size": found["linear_conv_kernel_dim"],
    }
    flags = [word for name, value in options.items() for word in (f"--gated-deltanet-{name}", str(value))]
    return kinds, tuple(flags)


def _kinds(config: Mapping[str, Any]) -> tuple[str, ...]:
    count = config["num_hidden_layers"]
    types = config.get("layer_types")
    if types is None:
        every = config.get("full_attention_interval", 4)
        types = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(count)]
    unknown = sorted(set(types) - set(TYPES))
    if unknown or len(types) != count:
        raise ValueError(
            f"config.json has layer_types {', '.join(unknown) or len(types)} for {count} layers\n"
            f"  why: each layer is one of {', '.join(TYPES)}\n"
            f"  try: the config.json that belongs to the weights"
        )
    return tuple(TYPES[name] for name in types)


def fields_of(kinds: Sequence[str], mixer: GatedDeltaNet.Config | None) -> dict[str, Any]:
    """The other way: the fields of the layers; without a mixer those of its heads are left to the class."""
    names = {ours: theirs for theirs, ours in TYPES.items()}
    fields: dict[str, Any] = {"layer_types": [names[kind] for kind in kinds]}
    if mixer is None:
        return fields
    return fields | {
        "linear_num_key_heads": mixer.num_heads,
        "linear_num_value_heads": mixer.num_heads * mixer.values_per_key,
        "linear_key_head_dim": mixer.head_k_dim,
        "linear_value_head_dim": mixer.head_v_dim // mixer.values_per_key,
        "linear_conv_kernel_dim": mixer.conv_size,
    }

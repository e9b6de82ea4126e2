"""Which tensors of Hugging Face are which of ours: one table per family, read in both directions.

A table maps a pattern of our checkpoint keys to the names on the other side, ``{i}`` a layer and ``{e}`` an expert, and
to what turns one into the other. What a model has is asked of the model itself: of a table only the rows count whose
key is there, so that biases, tied embeddings or dense layers need no second table. A name with a bracket is a part of
their tensor (:mod:`linear_moe.checkpoint.parts`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from linear_moe.checkpoint.remote import mixer_rows
from linear_moe.checkpoint.transforms import (
    ByHead,
    DeltaProjections,
    DeltaTaps,
    Flat,
    GatedGrouped,
    Grouped,
    Halves,
    Padded,
    Taps,
    Transform,
)
from linear_moe.lsm import Mixer
from linear_moe.lsm.gated_delta_net import GatedDeltaNet
from linear_moe.model.pattern import SOFTMAX


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that tables need."""

    kinds: tuple[str, ...]
    """Mixer of every layer."""
    mixers: Mapping[str, Mixer]
    """Every mixer of the model, by its name."""
    groups: int
    """Key/value groups of softmax layers."""
    channels: int
    """Channels of one of their heads."""
    vocab_size: int
    """Rows of the vocabulary on the other side."""
    padded_vocab_size: int
    """Rows of ours."""


@dataclass(frozen=True)
class Row:
    """One tensor of ours, or one expert's part of it, and where it is on the other side."""

    key: str
    names: tuple[str, ...]
    transform: Transform
    expert: int | None = None
    """Index on the first axis of our tensor, which holds every expert of the layer."""


type Entry = tuple[tuple[str, ...], Callable[[Shape], Transform]]
type Table = dict[str, Entry]


def _same(name: str) -> Entry:
    return (name,), lambda shape: Transform()


def _vocabulary(name: str) -> Entry:
    return (name,), lambda shape: Padded(shape.vocab_size, shape.padded_vocab_size)


def _halves(gate: str, up: str) -> Entry:
    return (gate, up), lambda shape: Halves()


def _qkv(q: str, k: str, v: str) -> Entry:
    return (q, k, v), lambda shape: Grouped(shape.groups, shape.channels)


_LAYER, _THEIRS = "decoder.layers.{i}.", "model.layers.{i}."
_ATTENTION, _MLP = _LAYER + "self_attention.", _LAYER + "mlp."
_THEIR_ATTENTION = _THEIRS + "self_attn."

_COMMON: Table = {
    "embedding.word_embeddings.weight": _vocabulary("model.embed_tokens.weight"),
    "output_layer.weight": _vocabulary("lm_head.weight"),
    "decoder.final_layernorm.weight": _same("model.norm.weight"),
    _LAYER + "input_layernorm.weight": _same(_THEIRS + "input_layernorm.weight"),
    _LAYER + "pre_mlp_layernorm.weight": _same(_THEIRS + "post_attention_layernorm.weight"),
    _MLP + "linear_fc1.weight": _halves(_THEIRS + "mlp.gate_proj.weight", _THEIRS + "mlp.up_proj.weight"),
    _MLP + "linear_fc2.weight": _same(_THEIRS + "mlp.down_proj.weight"),
}

_ORDINARY_ATTENTION: Table = {
    _ATTENTION + f"linear_qkv.{part}": _qkv(*(_THEIR_ATTENTION + f"{x}_proj.{part}" for x in "qkv"))
    for part in ("weight", "bias")
} | {
    _ATTENTION + "linear_proj.weight": _same(_THEIR_ATTENTION + "o_proj.weight"),
    _ATTENTION + "q_layernorm.weight": _same(_THEIR_ATTENTION + "q_norm.weight"),
    _ATTENTION + "k_layernorm.weight": _same(_THEIR_ATTENTION + "k_norm.weight"),
}

_LATENT_ATTENTION: Table = {
    _ATTENTION + ours: _same(_THEIR_ATTENTION + theirs)
    for ours, theirs in {
        "linear_q_proj.weight": "q_proj.weight",
        "linear_q_down_proj.weight": "q_a_proj.weight",
        "q_layernorm.weight": "q_a_layernorm.weight",
        "linear_q_up_proj.weight": "q_b_proj.weight",
        "linear_kv_down_proj.weight": "kv_a_proj_with_mqa.weight",
        "kv_layernorm.weight": "kv_a_layernorm.weight",
        "linear_kv_up_proj.weight": "kv_b_proj.weight",
        "linear_proj.weight": "o_proj.weight",
    }.items()
}


def _experts(block: str, gate: str, up: str, down: str, shared: str = "mlp.shared_expert.") -> Table:
    one = _THEIRS + block + "experts.{e}."
    return {
        _MLP + "router.weight": _same(_THEIRS + block + "gate.weight"),
        _MLP + "router.expert_bias": _same(_THEIRS + block + "gate.e_score_correction_bias"),
        _MLP + "experts.experts.linear_fc1.weight": _halves(f"{one}{gate}.weight", f"{one}{up}.weight"),
        _MLP + "experts.experts.linear_fc2.weight": _same(f"{one}{down}.weight"),
        _MLP + "shared_experts.linear_fc1.weight": _halves(
            _THEIRS + shared + "gate_proj.weight", _THEIRS + shared + "up_proj.weight"
        ),
        _MLP + "shared_experts.linear_fc2.weight": _same(_THEIRS + shared + "down_proj.weight"),
        _MLP + "shared_experts.gate_weight": _same(_THEIRS + "mlp.shared_expert_gate.weight"),
    }


def _delta(make: Callable[..., Transform], *names: str, memories: bool = False) -> Entry:
    def transform(shape: Shape) -> Transform:
        cfg = shape.mixers["gated_deltanet"].cfg
        assert isinstance(cfg, GatedDeltaNet.Config)
        more = (cfg.values_per_key,) if memories else ()
        return make(cfg.num_heads, cfg.head_k_dim, cfg.head_v_dim, *more)

    return tuple(_THEIRS + "linear_attn." + name for name in names), transform


_GATED_ATTENTION: Table = _ORDINARY_ATTENTION | {
    _ATTENTION + "linear_qkv.weight": (
        tuple(_THEIR_ATTENTION + f"{x}_proj.weight" for x in "qkv"),
        lambda shape: GatedGrouped(shape.groups, shape.channels),
    )
}

_GATED_DELTA_NET: Table = {
    _ATTENTION + "in_proj.weight": _delta(
        DeltaProjections, "in_proj_qkvz.weight", "in_proj_ba.weight", memories=True
    ),
    _ATTENTION + "conv_weight": _delta(DeltaTaps, "conv1d.weight"),
    _ATTENTION + "A_log": ((_THEIRS + "linear_attn.A_log",), lambda shape: Flat()),
    _ATTENTION + "dt_bias": ((_THEIRS + "linear_attn.dt_bias",), lambda shape: Flat()),
    _ATTENTION + "norm_weight": _same(_THEIRS + "linear_attn.norm.weight"),
    _ATTENTION + "out_proj.weight": _same(_THEIRS + "linear_attn.out_proj.weight"),
}

_THEIR_MIXER = "backbone.layers.{i}.mixer."


def _mamba2(make: Callable[[int, tuple[int, ...]], Transform], name: str, parts: dict[int, str]) -> Entry:
    """Parts of a tensor of theirs, ``[z x b c dt]``, by their number: those of our heads, or of our groups of heads, in
    our order."""

    def transform(shape: Shape) -> Transform:
        mixer = shape.mixers["mamba2"]
        table = {p.name: p for p in mixer.all_projections()}
        assert [name for name in table if name in parts.values()] == list(parts.values()), "our order"
        is_grouped = any(table[part].grouped for part in parts.values())
        return make(
            mixer.num_groups if is_grouped else mixer.cfg.num_heads,
            tuple(table[part].width for part in parts.values()),
        )

    return tuple(f"{_THEIR_MIXER}{name}[{number}]" for number in parts), transform


_MAMBA2: Table = {
    "embedding.word_embeddings.weight": _vocabulary("backbone.embeddings.weight"),
    "output_layer.weight": _vocabulary("lm_head.weight"),
    "decoder.final_layernorm.weight": _same("backbone.norm_f.weight"),
    _LAYER + "input_layernorm.weight": _same("backbone.layers.{i}.norm.weight"),
    _ATTENTION + "in_proj.weight": _mamba2(ByHead, "in_proj.weight", {1: "x", 4: "dt", 0: "g"}),
    _ATTENTION + "group_proj.weight": _mamba2(ByHead, "in_proj.weight", {2: "b", 3: "c"}),
    **{_ATTENTION + f"conv_{x}": _mamba2(Taps, f"conv1d.{x}", {0: "x"}) for x in ("weight", "bias")},
    **{
        _ATTENTION + f"group_conv_{x}": _mamba2(Taps, f"conv1d.{x}", {1: "b", 2: "c"})
        for x in ("weight", "bias")
    },
    **{_ATTENTION + x: _same(_THEIR_MIXER + x) for x in ("A_log", "D", "dt_bias", "out_proj.weight")},
    _ATTENTION + "norm_weight": ((_THEIR_MIXER + "norm.weight",), lambda shape: Flat()),
}

_QWEN2 = _COMMON | _ORDINARY_ATTENTION | _experts("mlp.", "gate_proj", "up_proj", "down_proj")

TABLES: dict[str, Table] = {
    "qwen2": _QWEN2,
    "qwen2_moe": _QWEN2,
    "qwen3_next": _QWEN2 | _GATED_ATTENTION | _GATED_DELTA_NET,
    "llama": _COMMON | _ORDINARY_ATTENTION,
    "mixtral": _COMMON | _ORDINARY_ATTENTION | _experts("block_sparse_moe.", "w1", "w3", "w2"),
    "deepseek_v2": _COMMON
    | _LATENT_ATTENTION
    | _experts("mlp.", "gate_proj", "up_proj", "down_proj", "mlp.shared_experts."),
    "mamba2": _MAMBA2,
    "linear_moe": _QWEN2,
}
"""By ``model_type`` of config.json. That of ``linear_moe`` goes on with the mixers, and DeepSeek-V2's attention."""


def rows(model_type: str, shape: Shape, keys: Mapping[str, tuple[int, ...]]) -> tuple[list[Row], list[str]]:
    """The rows of a model.

    Args:
        model_type: of the Hugging Face side.
        shape: of the model.
        keys: our tensors and their shapes, for the number of experts.

    Returns:
        The rows in the order of our keys, and the keys that the table has no row for.
    """
    table = dict(TABLES[model_type])
    if model_type == "linear_moe":
        latent = any("linear_kv_down_proj" in key for key in keys)
        table |= _LATENT_ATTENTION if latent else {}
    found: list[Row] = []
    unknown = []
    for key in sorted(keys, key=_by_number):
        match = re.fullmatch(r"(decoder\.layers\.)(\d+)(\..*)", key)
        layer = int(match[2]) if match else None
        pattern = key if match is None else f"{match[1]}{{i}}{match[3]}"
        if pattern in table:
            found += _entry_rows(key, layer, *table[pattern], shape, keys[key])
        elif model_type == "linear_moe" and (row := _mixer_row(key, layer, shape)) is not None:
            found.append(row)
        else:
            unknown.append(key)
    return found, unknown


def _by_number(key: str) -> list[tuple[int, str]]:
    # layer 2 before layer 10: near the order of the files, which keeps reading sequential
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]


def _entry_rows(
    key: str,
    layer: int | None,
    names: Iterable[str],
    make: Callable[[Shape], Transform],
    shape: Shape,
    size: tuple[int, ...],
) -> list[Row]:
    names = tuple(name.replace("{i}", str(layer)) for name in names)
    if not any("{e}" in name for name in names):
        return [Row(key, names, make(shape))]
    experts = range(size[0])
    return [Row(key, tuple(n.replace("{e}", str(e)) for n in names), make(shape), e) for e in experts]


def _mixer_row(key: str, layer: int | None, shape: Shape) -> Row | None:
    """The row of a mixer's tensor: its names follow from the mixer's own tables."""
    if layer is None:
        tables, _, name = key.partition(".")
        mixer_name = tables.removesuffix("_tables")
        known = tables.endswith("_tables") and mixer_name in shape.mixers
        return Row(key, (f"model.tables.{mixer_name}.{name}",), Transform()) if known else None
    kind, prefix = shape.kinds[layer], f"decoder.layers.{layer}.self_attention."
    if kind == SOFTMAX or not key.startswith(prefix):
        return None
    layer_of_kind = shape.kinds[:layer].count(kind)
    parts = [
        row for row in mixer_rows(shape.mixers[kind], layer_of_kind) if row.key == key.removeprefix(prefix)
    ]
    if not parts:
        return None
    names = tuple(f"model.layers.{layer}.mixer.{row.name}" for row in parts)
    if parts[0].start is None:
        return Row(key, names, Transform())
    widths = tuple((row.stop or 0) - (row.start or 0) for row in parts)
    return Row(key, names, ByHead(parts[0].groups, widths))

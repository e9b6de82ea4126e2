"""Names of a mixer's tensors in an exported folder, from its tables: one row per projection and per parameter.

The fused projection of a :class:`~linear_moe.model.mixer_layer.MixerLayer` is laid out head by head, an exported one
by projection; nothing else differs but names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from linear_moe.lsm import Mixer, Projection


@dataclass(frozen=True)
class MixerRow:
    """One tensor of an exported mixer, and which part of one of ours it is.

    Attributes:
        name: exported, below ``model.layers.{i}.mixer.``.
        key: ours, below ``decoder.layers.{i}.self_attention.``, unsharded.
        groups: parts that ``key`` has along its first axis (heads or groups of heads), if the row is a slice of it.
        start: first channel of the row in each of those parts; ``None``: the row is all of ``key``.
        stop: the channel after its last.
    """

    name: str
    key: str
    groups: int = 1
    start: int | None = None
    stop: int | None = None


def mixer_rows(mixer: Mixer, layer_of_kind: int) -> list[MixerRow]:
    """Every tensor of a layer; not those that all layers share.

    Args:
        mixer: with the config it has in the model.
        layer_of_kind: index of the layer among those of its mixer, from 0.
    """
    rows = [
        *_slices(mixer.fused_projections(), "in_proj.weight", mixer.cfg.num_heads),
        *_slices(mixer.grouped_projections(), "group_proj.weight", mixer.num_groups),
    ]
    for p in mixer.low_rank_projections(layer_of_kind):
        names = {"down.weight": "down", "up.weight": "up.weight"} | ({"up.bias": "up.bias"} if p.bias else {})
        rows += [
            MixerRow(f"{p.name}.{theirs}", f"low_rank.{p.name}.{ours}") for theirs, ours in names.items()
        ]
    rows += [MixerRow(table.name, table.name) for table in mixer.all_parameters() if not table.per_model]
    return [*rows, MixerRow("o_proj.weight", "out_proj.weight")]


def _slices(table: Sequence[Projection], key: str, groups: int) -> list[MixerRow]:
    rows, start = [], 0
    for p in table:
        rows.append(MixerRow(f"{p.name}.weight", key, groups, start, start + p.width))
        start += p.width
    return rows

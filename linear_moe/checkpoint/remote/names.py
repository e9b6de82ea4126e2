"""Names of a mixer's tensors in an exported folder, from its tables: one row per projection and per parameter.

The fused projection of a :class:`~linear_moe.model.mixer_layer.MixerLayer` is laid out head by head, an exported one
by projection; nothing else differs but names.

Letters: H heads of the layer, G groups of heads, W fused width per head, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from linear_moe.lsm import Mixer, Projection


@dataclass(frozen=True)
class MixerRow:
    """One tensor of an exported mixer, and which part of one of ours it is.

    Attributes:
        name: exported, below ``model.layers.{i}.mixer.``.
        key: ours, below ``decoder.layers.{i}.self_attention.``, unsharded.
        shape: of the exported tensor.
        groups: parts that ``key`` has along its first axis (heads or groups of heads), if the row is a slice of it.
        start: first channel of the row in each of those parts; ``None``: the row is all of ``key``.
        stop: the channel after its last.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    groups: int = 1
    start: int | None = None
    stop: int | None = None

    def part(self, ours: Tensor) -> Tensor:
        """The row's part of our unsharded tensor: a view, ``[groups, stop - start, D]`` or the whole."""
        if self.start is None:
            return ours
        return ours.unflatten(0, (self.groups, -1))[:, self.start : self.stop]

    def exported(self, ours: Tensor) -> Tensor:
        """Our unsharded tensor to the exported one."""
        return self.part(ours).reshape(self.shape)

    def fill(self, ours: Tensor, exported: Tensor) -> None:
        """Write the exported tensor into its part of ours, in place."""
        part = self.part(ours)
        part.copy_(exported.reshape(part.shape))


def mixer_rows(mixer: Mixer, layer_of_kind: int) -> list[MixerRow]:
    """Every tensor of a layer, but those of the whole model (:func:`model_rows`).

    Args:
        mixer: with the config it has in the model.
        layer_of_kind: index of the layer among those of its mixer, from 0.
    """
    cfg = mixer.cfg
    hidden, heads = cfg.hidden_size, cfg.num_heads
    rows = [
        *_slices(mixer.fused_projections(), "in_proj.weight", heads, hidden),
        *_slices(mixer.grouped_projections(), "group_proj.weight", mixer.num_groups, hidden),
    ]
    for p in mixer.low_rank_projections(layer_of_kind):
        assert p.rank is not None
        shapes = {
            "down": (p.rank, hidden),
            "up.weight": (heads * p.width, p.rank),
            "up.bias": (heads * p.width,),
        }
        for part, shape in shapes.items():
            if part != "up.bias" or p.bias:
                name = f"{p.name}.down.weight" if part == "down" else f"{p.name}.{part}"
                rows.append(MixerRow(name, f"low_rank.{p.name}.{part}", shape))
    for table in mixer.all_parameters():
        if not table.per_model:
            rows.append(MixerRow(table.name, table.name, table.shape))
    rows.append(MixerRow("o_proj.weight", "out_proj.weight", (hidden, heads * cfg.head_v_dim)))
    return rows


def model_rows(mixer: Mixer) -> list[MixerRow]:
    """What all layers of a mixer share: exported below ``model.tables.{mixer}.``, ours below ``{mixer}_tables.``."""
    return [
        MixerRow(table.name, table.name, table.shape) for table in mixer.all_parameters() if table.per_model
    ]


def _slices(table: Sequence[Projection], key: str, groups: int, hidden: int) -> list[MixerRow]:
    rows, start = [], 0
    for p in table:
        shape = (groups * p.width, hidden)
        rows.append(MixerRow(f"{p.name}.weight", key, shape, groups, start, start + p.width))
        start += p.width
    return rows

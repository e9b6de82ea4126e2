"""What a mixer's file is made of: its tables of projections and parameters, where it is placed, what it remembers.

Letters: N runs, H heads here, G groups of heads here, D hidden, C channels of the short convolution, W its width,
K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def _same(x: Tensor) -> Tensor:
    return x


WAISTS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: _same,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
"""Activations between the two maps of a low-rank projection."""


@dataclass(frozen=True)
class Projection:
    """A named linear map of the layer's input, ``num_heads * width`` channels.

    Attributes:
        name: key of the projected tensor ``[B, T, H, width]`` in ``gates``.
        width: channels per head.
        bias: add a learned bias.
        rank: low rank: input -> ``rank`` channels (replicated over TP) -> heads; ``None``: part of the fused GEMM.
        waist: activation between the two maps of a low-rank projection.
        conv: passes through the layer's short convolution; such projections come first in the table.
        grouped: ``width`` channels for each of the mixer's ``num_groups`` groups of heads, instead of each head:
            ``[B, T, G, width]`` in ``gates``, the groups that the heads here belong to. Computed on every
            tensor-parallel rank, so meant to be narrow; without bias.
        after_first: low rank only: the first layer of the mixer is without it, as it is without a first value.
    """

    name: str
    width: int
    bias: bool = False
    rank: int | None = None
    waist: Literal["tanh", "sigmoid"] | None = None
    conv: bool = False
    grouped: bool = False
    after_first: bool = False


def checked_names(
    mixer: str, table: tuple[Projection, ...], output: tuple[Projection, ...]
) -> tuple[Projection, ...]:
    """Both tables in one.

    Raises:
        ValueError: the first is no table, or two projections have one name.
    """
    if isinstance(table, Projection):
        raise ValueError(
            f"projections() of {mixer} is the projection {table.name!r} alone\n"
            f"  why: it is the table of all of them, and a tuple of one ends in a comma\n"
            f"  try: (*self.qkv(), Projection({table.name!r}, {table.width}))"
        )
    names = [p.name for p in (*table, *output)]
    for name in names:
        if names.count(name) > 1:
            of_gate = ", and is that of the output gate unless output_gate is none"
            raise ValueError(
                f"{mixer} has two projections of the name {name!r}\n"
                f"  why: gates finds each by its name{of_gate if any(p.name == name for p in output) else ''}\n"
                f"  try: another name for one of them"
            )
    return (*table, *output)


@dataclass(frozen=True)
class Parameter:
    """A learned tensor that is not a projection.

    Attributes:
        name: key in ``gates`` and in the checkpoint.
        shape: of the whole tensor; starts with ``num_heads`` when ``per_head``.
        init: fills the tensor (this rank's heads of it) in place; ``None``: as the model's projections.
        per_head: sharded over tensor-parallel ranks by head; otherwise one copy serves all heads.
        keep_float32: stays float32 in a half-precision model.
        per_model: one tensor for all layers of this mixer in the model, on every pipeline stage; ``init`` must then
            not be random.
    """

    name: str
    shape: tuple[int, ...]
    init: Callable[[Tensor], object] | None
    per_head: bool = True
    keep_float32: bool = False
    per_model: bool = False


@dataclass(frozen=True)
class Placement:
    """Which heads of which layer are computed here: decays by head or depth use global indices.

    Attributes:
        num_heads: heads here.
        first_head: global index of the first of them.
        layer: global index of the layer, from 0.
        num_layers: layers of the model.
        layer_of_kind: index of the layer among those of its mixer, from 0.
        sum_over_ranks: adds up what the ranks that hold the other heads give, with gradients.
    """

    num_heads: int
    first_head: int = 0
    layer: int = 0
    num_layers: int = 1
    layer_of_kind: int = 0
    sum_over_ranks: Callable[[Tensor], Tensor] = _same

    def groups(self, num_groups: int, num_heads: int) -> slice:
        """Which of ``num_groups`` groups of all ``num_heads`` heads those here belong to."""
        per_group = num_heads // num_groups
        return slice(self.first_head // per_group, -(-(self.first_head + self.num_heads) // per_group))


LAYOUTS = {
    "TP": "tensor parallel",
    "SP": "sequence parallel",
    "CP": "context parallel",
    "PP": "pipeline parallel",
    "VPP": "virtual pipeline stages",
    "EP": "expert parallel",
    "packed": "documents packed in one sequence",
    "decode": "generation from a recurrent state",
    "recompute": "activations computed again in the backward pass",
}
"""What a mixer may be asked to work under: the keys of ``Mixer.unsupported``, and what they stand for."""


Memory = Sequence[Tensor]
"""``[N, H, K, V]`` float32 for each matrix memory of a mixer; most have one."""


@dataclass(frozen=True)
class MixerState:
    """What decoding carries from one call to the next; every field but the memory is ``None`` where not needed.

    Attributes:
        memory: the memories after the last token.
        conv: ``[N, W - 1, H, C]``, the last inputs of the short convolution.
        group_conv: ``[N, W - 1, G, C]``, the same of grouped projections.
        hidden: ``[N, 1, D]``, the last input of the layer (token shift).
        length: ``[N]`` int64, tokens read so far (positions).
    """

    memory: Memory
    conv: Tensor | None = None
    group_conv: Tensor | None = None
    hidden: Tensor | None = None
    length: Tensor | None = None


def channel_places(num_heads: int, width: int, place: Placement) -> Tensor:
    """Where each channel of the heads here is among those of all heads, 0 to 1: ``[H, width]``."""
    whole = torch.linspace(0, 1, num_heads * width).unflatten(0, (num_heads, width))
    return whole[place.first_head : place.first_head + place.num_heads]


def widen(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is when it is wider: gates and long sums never run in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

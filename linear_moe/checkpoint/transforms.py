"""How tensors of Hugging Face become one of ours and back: permutations and copies, so that both ways are exact.

Letters: G key/value groups, Q query heads of a group, C channels of a head, H heads, W channels per head of a fused
projection, D input channels, V rows of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class Transform:
    """One tensor, as it is; the others subclass this. Works on ``meta`` tensors, which is how shapes are checked."""

    def to_ours(self, parts: list[Tensor]) -> Tensor:
        """Tensors of Hugging Face, in the order of their names, to ours."""
        return parts[0]

    def to_theirs(self, whole: Tensor) -> list[Tensor]:
        """The inverse."""
        return [whole]


@dataclass(frozen=True)
class Padded(Transform):
    """The vocabulary, with rows of zeros below it so that every tensor-parallel size divides it."""

    rows: int
    """Theirs."""
    padded: int
    """Ours."""

    def to_ours(self, parts: list[Tensor]) -> Tensor:
        """``[V, D]`` to ``[padded, D]``."""
        (table,) = parts
        if table.shape[0] == self.padded:
            return table
        assert table.shape[0] <= self.padded, (table.shape, self)
        whole = table.new_zeros((self.padded, *table.shape[1:]))
        whole[: table.shape[0]] = table
        return whole

    def to_theirs(self, whole: Tensor) -> list[Tensor]:
        """Without the rows below."""
        return [whole[: self.rows]]


@dataclass(frozen=True)
class Grouped(Transform):
    """Query, key and value, fused group by group: ``[q q .. k v]`` of group 0, then of group 1 (Megatron's layout)."""

    groups: int
    """G."""
    channels: int
    """C."""

    def to_ours(self, parts: list[Tensor]) -> Tensor:
        """``[G * Q * C, ..]`` and twice ``[G * C, ..]`` to ``[G * (Q + 2) * C, ..]``."""
        return torch.cat([part.unflatten(0, (self.groups, -1)) for part in parts], dim=1).flatten(0, 1)

    def to_theirs(self, whole: Tensor) -> list[Tensor]:
        """The three, each contiguous."""
        by_group = whole.unflatten(0, (self.groups, -1))
        widths = [by_group.shape[1] - 2 * self.channels, self.channels, self.channels]
        return [part.flatten(0, 1) for part in by_group.split(widths, dim=1)]


@dataclass(frozen=True)
class Halves(Transform):
    """Gate and up projection, one below the other."""

    def to_ours(self, parts: list[Tensor]) -> Tensor:
        """Twice ``[F, D]`` to ``[2 * F, D]``."""
        return torch.cat(parts, dim=0)

    def to_theirs(self, whole: Tensor) -> list[Tensor]:
        """The halves."""
        return list(whole.chunk(2, dim=0))


@dataclass(frozen=True)
class ByHead(Transform):
    """Projections fused head by head: ``[q k v ..]`` of head 0, then of head 1 (the layout of our mixers)."""

    heads: int
    """H; groups of heads, for a projection of groups."""
    widths: tuple[int, ...]
    """Channels per head of each projection."""

    def to_ours(self, parts: list[Tensor]) -> Tensor:
        """``[H * width, D]`` each to ``[H * W, D]``."""
        return torch.cat([part.unflatten(0, (self.heads, -1)) for part in parts], dim=1).flatten(0, 1)

    def to_theirs(self, whole: Tensor) -> list[Tensor]:
        """Each projection."""
        by_head = whole.unflatten(0, (self.heads, -1))
        return [part.flatten(0, 1) for part in by_head.split(self.widths, dim=1)]

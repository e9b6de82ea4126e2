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
class GatedGrouped(Transform):
    """The same with an output gate per query channel: ``[q q .. gate gate .. k v]`` of group 0, then of group 1.

    On the other side each query head is followed by its gate, ``[q gate]`` of head 0, then of head 1.
    """

    groups: int
    """G."""
    channels: int
    """C."""

    def to_ours(self, parts: list[Tensor]) -> Tensor:
        """``[G * Q * 2 * C, ..]`` and twice ``[G * C, ..]`` to ``[G * (2 * Q + 2) * C, ..]``."""
        q, *rest = parts
        by_head = q.unflatten(0, (self.groups, -1, 2, self.channels))
        fused = by_head.transpose(1, 2).flatten(1, 3)
        return torch.cat([fused, *(part.unflatten(0, (self.groups, -1)) for part in rest)], dim=1).flatten(
            0, 1
        )

    def to_theirs(self, whole: Tensor) -> list[Tensor]:
        """The three, each contiguous."""
        by_group = whole.unflatten(0, (self.groups, -1))
        queries = by_group.shape[1] - 2 * self.channels
        q, k, v = by_group.split([queries, self.channels, self.channels], dim=1)
        by_head = q.unflatten(1, (2, -1, self.channels)).transpose(1, 2)
        return [by_head.flatten(0, 3), k.flatten(0, 1), v.flatten(0, 1)]


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


@dataclass(frozen=True)
class Taps(Transform):
    """A short convolution or its bias: all heads of x, of b, of c on the other side, ``[x b c]`` of each on ours."""

    heads: int
    """H; groups of heads, for a projection of groups."""
    widths: tuple[int, ...]
    """Channels per head of each projection."""

    def to_ours(self, parts: list[Tensor]) -> Tensor:
        """``[H * width, 1, taps]`` or ``[H * width]`` each to ``[H, widths, taps]`` or ``[H, widths]``."""
        whole = torch.cat([part.unflatten(0, (self.heads, -1)) for part in parts], dim=1)
        return whole.squeeze(2) if whole.ndim == 4 else whole

    def to_theirs(self, whole: Tensor) -> list[Tensor]:
        """The inverse."""
        by_part = [part.flatten(0, 1) for part in whole.split(self.widths, dim=1)]
        return [part.unsqueeze(1) if part.ndim == 2 else part for part in by_part]


class Flat(Transform):
    """One number per channel or value head, which ours have in rows of those of a head, ``[H, R]``."""

    def to_theirs(self, whole: Tensor) -> list[Tensor]:
        """``[H * R]``; the way back is a change of shape only, as every tensor of ours gets its own."""
        return [whole.flatten()]


@dataclass(frozen=True)
class DeltaProjections(Transform):
    """Gated DeltaNet's, head by head on both sides: ``[q k v a b g]`` in one tensor; ``[q k v g]`` and ``[b a]``."""

    heads: int
    """H."""
    key: int
    """Channels of a head's query, and of its key."""
    value: int
    """Channels of a head's values, and of their gates."""
    memories: int
    """Values of a head: numbers in its a, and in its b."""

    def to_ours(self, parts: list[Tensor]) -> Tensor:
        """``[H * (2 * key + 2 * value), D]`` and ``[H * 2 * memories, D]`` to one."""
        main, small = (part.unflatten(0, (self.heads, -1)) for part in parts)
        q, k, v, g = main.split([self.key, self.key, self.value, self.value], dim=1)
        b, a = small.split(self.memories, dim=1)
        return torch.cat([q, k, v, a, b, g], dim=1).flatten(0, 1)

    def to_theirs(self, whole: Tensor) -> list[Tensor]:
        """The two."""
        widths = [self.key, self.key, self.value, self.memories, self.memories, self.value]
        q, k, v, a, b, g = whole.unflatten(0, (self.heads, -1)).split(widths, dim=1)
        return [torch.cat(parts, dim=1).flatten(0, 1) for parts in ((q, k, v, g), (b, a))]


@dataclass(frozen=True)
class DeltaTaps(Transform):
    """The short convolution: all heads of q, of k, of v on the other side, ``[q k v]`` of each head on ours."""

    heads: int
    """H."""
    key: int
    """Channels of a head's query, and of its key."""
    value: int
    """Channels of a head's values."""

    def to_ours(self, parts: list[Tensor]) -> Tensor:
        """``[H * (2 * key + value), 1, W]`` to ``[H, 2 * key + value, W]``."""
        widths = [self.heads * width for width in (self.key, self.key, self.value)]
        by_part = parts[0].squeeze(1).split(widths)
        return torch.cat([part.unflatten(0, (self.heads, -1)) for part in by_part], dim=1)

    def to_theirs(self, whole: Tensor) -> list[Tensor]:
        """The inverse."""
        by_part = whole.split([self.key, self.key, self.value], dim=1)
        return [torch.cat([part.flatten(0, 1) for part in by_part]).unsqueeze(1)]

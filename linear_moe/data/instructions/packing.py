"""Whole samples side by side in sequences of one length, and the order in which training takes the sequences.

    an epoch    every pack once, in an order of its own, and empty ones to a whole number of steps
    slot i      epoch i // E, place i % E of its order;  E = steps of an epoch x packs of a step

Everything follows from lengths and a seed: a run that stops at slot i goes on there, whatever its layout.
"""

import math
from dataclasses import dataclass

import numpy as np


def pack(lengths: np.ndarray, room: int, seed: int) -> list[list[int]]:
    """Samples of each pack: best fit, longest first; samples of one length in an order that the seed gives.

    Args:
        lengths: ``[N]`` of the samples, 1 to ``room``.
        room: of a pack.
        seed: of the order.
    """
    shuffled = np.random.default_rng([seed, 0]).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    packs: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(room + 1)]
    spaces = 0  # bit s: some pack has space s
    for sample in order.tolist():
        length = int(lengths[sample])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            chosen = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
        else:
            space, chosen = room, len(packs)
            packs.append([])
        packs[chosen].append(sample)
        with_space[space - length].append(chosen)
        if space > length:
            spaces |= 1 << (space - length)
    return packs


def alone(lengths: np.ndarray) -> list[list[int]]:
    """Every sample in a sequence of its own."""
    return [[sample] for sample in range(len(lengths))]


@dataclass(frozen=True)
class Schedule:
    """Which pack each slot of training holds."""

    num_packs: int
    """Packs of an epoch."""
    per_step: int
    """Packs of a step: the global batch."""
    seed: int
    """Of the orders."""
    shuffle: bool = True
    """A new order in every epoch; else the order of the packs."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps that take every pack once; the last of them may be partly empty."""
        return math.ceil(self.num_packs / self.per_step)

    def order(self, epoch: int) -> np.ndarray:
        """Packs of an epoch, ``[num_packs]``."""
        if not self.shuffle:
            return np.arange(self.num_packs)
        return np.random.default_rng([self.seed, 1 + epoch]).permutation(self.num_packs)

    def place(self, slot: int) -> tuple[int, int | None]:
        """Epoch of a slot and its place in the epoch's order; ``None``: it is empty."""
        epoch, place = divmod(slot, self.steps_per_epoch * self.per_step)
        return epoch, place if place < self.num_packs else None

"""Packs and their order against plain definitions: a run that goes on has to meet the packs that it left."""

import numpy as np
import pytest

from linear_moe.data.instructions.packing import Schedule, pack


def definition(lengths: list[int], room: int, seed: int) -> list[list[int]]:
    """Best fit, longest first: among packs with the least space that will do, the one that got it last."""
    drawn = np.random.default_rng([seed, 0]).permutation(len(lengths)).tolist()
    packs: list[list[int]] = []
    left: list[tuple[int, int]] = []  # space, and when the pack got it
    for now, sample in enumerate(sorted(drawn, key=lambda i: -lengths[i])):
        fitting = [(space, -since, i) for i, (space, since) in enumerate(left) if space >= lengths[sample]]
        if fitting:
            space, _, i = min(fitting)
        else:
            space, i = room, len(packs)
            packs.append([])
            left.append((room, now))
        packs[i].append(sample)
        left[i] = (space - lengths[sample], now)
    return packs


@pytest.mark.parametrize(
    "lengths,room",
    [
        (np.random.default_rng(1).integers(1, 31, size=300), 40),
        (np.random.default_rng(2).integers(8, 13, size=60), 32),
        (np.ones(7, dtype=np.int64), 4),
        (np.asarray([1]), 64),
        (np.asarray([5, 5, 5]), 5),
    ],
    ids=["of all lengths", "none are small", "of one token", "one", "full packs"],
)
@pytest.mark.parametrize("seed", [0, 7])
def test_packs_are_those_of_best_fit(lengths, room, seed):
    assert pack(lengths, room, seed) == definition(lengths.tolist(), room, seed)


def test_an_epoch_has_an_order_of_its_own_and_not_that_of_the_packs():
    schedule = Schedule(num_packs=50, per_step=8, seed=3)
    orders = [schedule.order(epoch).tolist() for epoch in range(4)]
    assert orders == [np.random.default_rng([3, 1 + epoch]).permutation(50).tolist() for epoch in range(4)]
    unshuffled = Schedule(num_packs=50, per_step=8, seed=3, shuffle=False)
    assert unshuffled.order(2).tolist() == list(range(50))

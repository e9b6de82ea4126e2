"""Ranks as threads of one process: collectives over shared memory, with one autograd graph across all of them.

The truth that context parallelism is measured against needs whole sequences; here every rank's inputs are pieces of the
same leaf tensors, so gradients of the whole come out of one backward pass, without gloo.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import torch


class ThreadGroup:
    """The part of a process group that ``linear_moe.parallel`` uses."""

    def __init__(self, rank: int, barrier: Barrier, slots: list[Any]) -> None:
        self._rank, self._barrier, self._slots = rank, barrier, slots

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return len(self._slots)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        self._slots[self._rank] = x
        self._barrier.wait(timeout=30)
        gathered = torch.stack(self._slots)
        self._barrier.wait(timeout=30)
        return gathered


def all_gather(x: torch.Tensor, group: ThreadGroup) -> torch.Tensor:
    """Stands in for ``linear_moe.parallel.collectives.all_gather``."""
    return group.gather(x)


def on_ranks(world_size: int, fn: Callable[[ThreadGroup], Any]) -> list[Any]:
    """``[fn(group of rank) for rank in range(world_size)]``, in lockstep."""
    barrier, slots = Barrier(world_size), [None] * world_size
    groups = [ThreadGroup(rank, barrier, slots) for rank in range(world_size)]
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(fn, groups))

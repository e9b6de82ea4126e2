"""Ranks as threads of one process: collectives over shared memory, with one autograd graph across all of them.

The truth that context parallelism is measured against needs whole sequences; here every rank's inputs are pieces of the
same leaf tensors, so gradients of the whole come out of one backward pass, without gloo.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock
from types import SimpleNamespace
from typing import Any

import torch


class ThreadGroup:
    """The part of a process group that ``linear_moe.parallel`` uses."""

    def __init__(self, rank: int, barrier: Barrier, slots: list[Any], turn: Lock) -> None:
        self._rank, self._barrier, self._slots, self._turn = rank, barrier, slots, turn

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return len(self._slots)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        self._slots[self._rank] = x
        self._wait()
        gathered = torch.stack(self._slots)
        self._wait()
        return gathered

    def _wait(self) -> None:
        """For the other ranks, who run meanwhile."""
        self._turn.release()
        try:
            self._barrier.wait(timeout=30)
        finally:
            self._turn.acquire()

    def run(self, fn: Callable[["ThreadGroup"], Any]) -> Any:
        """One rank at a time: threads that run at once would spend their time on Python's lock."""
        with self._turn:
            return fn(self)


def all_gather(x: torch.Tensor, group: ThreadGroup) -> torch.Tensor:
    """Stands in for ``linear_moe.parallel.collectives.all_gather``."""
    return group.gather(x)


def start_all_gather(x: torch.Tensor, group: ThreadGroup) -> SimpleNamespace:
    """Stands in for ``linear_moe.parallel.collectives.start_all_gather``; everything happens in its ``wait``."""
    return SimpleNamespace(wait=lambda: group.gather(x))


def on_ranks(world_size: int, fn: Callable[[ThreadGroup], Any]) -> list[Any]:
    """``[fn(group of rank) for rank in range(world_size)]``, in lockstep."""
    barrier, slots, turn = Barrier(world_size), [None] * world_size, Lock()
    groups = [ThreadGroup(rank, barrier, slots, turn) for rank in range(world_size)]
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(lambda group: group.run(fn), groups))

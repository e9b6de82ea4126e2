"""A memory that is still on its way: what needs no memory is started first, and only then is it waited for.

Under context parallelism the memory before a run comes from other ranks. An operation takes a function in the place of
a ``state``; between the start of the all-gather and the call of that function it starts what depends on its tokens
alone: the scores and triangular systems of its chunks, decays, what parts of the sequence do to any memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

State = Tensor | Callable[[], Tensor] | None
"""``[N, H, K, V]``, the memory before the first token; or a function that waits for it; or ``None``, an empty one."""


def meanwhile(state: State, begin: Callable[..., Any], *args: Any) -> tuple[Tensor | None, Any]:
    """Start what needs no memory, if the memory is still on its way, then wait for it.

    Returns:
        The memory, and what ``begin(*args)`` returned, computed without autograd: constants to the function of
        autograd that uses them, whose backward pass is derived from its inputs. ``None`` if there was no wait.
    """
    if not callable(state):
        return state, None
    with torch.no_grad():
        begun = begin(*args)
    return state(), begun


class Arriving(Sequence[Tensor]):
    """The matrix memories of a mixer while they are on their way: looking at one waits for all of them."""

    def __init__(self, count: int, wait: Callable[[], Sequence[Tensor]]) -> None:
        self._count, self._wait = count, wait
        self._here: tuple[Tensor, ...] | None = None

    def __len__(self) -> int:
        """Without waiting."""
        return self._count

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if self._here is None:
            self._here = tuple(self._wait())
            assert len(self._here) == self._count
            del self._wait  # and what it holds: what all ranks have sent
        return self._here[index]


def states_of(memory: Sequence[Tensor] | None, count: int = 1) -> tuple[State, ...]:
    """The ``count`` matrices of a memory as operations take them: not looked at, if they are on their way."""
    if not memory:
        return (None,) * count
    assert len(memory) == count
    if not isinstance(memory, Arriving):
        return tuple(memory)
    return tuple(partial(memory.__getitem__, i) for i in range(count))

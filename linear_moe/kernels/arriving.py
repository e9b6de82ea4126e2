"""A memory that is still on its way: what needs no memory is started first, and only then is it waited for.

Under context parallelism the memory before a run comes from other ranks. An operation takes a function in the place of
a ``state``; between the start of the all-gather and the call of that function it starts what depends on its tokens
alone: the scores and triangular systems of its chunks, decays, what parts of the sequence do to any memory. Backward it
is the other way around: the gradient of the memory comes first, and while other ranks' are added to it, those of the
tokens are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from linear_moe.kernels.once import once_differentiable

State = Tensor | Callable[[], Tensor] | None
"""``[N, H, K, V]``, the memory before the first token; or a function that waits for it; or ``None``, an empty one."""

Tensors = tuple[Tensor | None, ...]


class Early:
    """What an operation computes while its memory is on its way, and what it leaves for later in the backward pass."""

    def __init__(self, begun: Any) -> None:
        self._begun = begun
        self.gradients: Callable[[], Tensors] | None = None
        """Computes the gradients of the tokens, once that of the memory is on its way."""

    def take(self) -> Any:
        """What was computed early, without autograd: the operation's backward pass starts from its inputs again.

        Can be taken once: it is not kept from the forward to the backward pass.
        """
        begun, self._begun = self._begun, None
        return begun


def meanwhile(
    state: State, begin: Callable[..., Any], tokens: Tensors, *options: Any
) -> tuple[Tensor | None, Tensors, Early | None]:
    """Start what needs no memory, ``begin(*tokens, *options)``, if the memory is still on its way; then wait for it.

    Returns:
        The memory; the tokens; and what was done early, ``None`` if there was no wait. With it, the backward pass of
        the operation hands the gradients of its tokens to :func:`afterwards`.
    """
    if not callable(state):
        return state, tokens, None
    with torch.no_grad():
        early = Early(begin(*tokens, *options))
    if torch.is_grad_enabled():
        tokens = _Tokens.apply(early, *tokens)
    return state(), tokens, early


def afterwards(early: Early | None, gradients: Callable[[], Tensors], count: int) -> Tensors:
    """The gradients of ``count`` token tensors; or ``None`` for each, left to ``early``, if there was an early part."""
    if early is None:
        return gradients()
    early.gradients = gradients
    return (None,) * count


class _Tokens(torch.autograd.Function):
    """Hands tokens on unchanged; its backward pass gives them the gradients that the operation left to ``early``.

    Autograd runs first what was recorded last. This is recorded before the memory arrives, so it runs after the
    memory's gradient has been sent, and before that is waited for.
    """

    @staticmethod
    def forward(ctx: Any, early: Early, *tokens: Tensor | None) -> Tensors:
        ctx.early = early
        ctx.set_materialize_grads(False)
        same = tuple(None if x is None else x.view_as(x) for x in tokens)
        constants = [y for y, needed in zip(same, ctx.needs_input_grad[1:]) if not needed and y is not None]
        ctx.mark_non_differentiable(*constants)
        return same

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *nothing: None) -> tuple[Any, ...]:
        gradients, ctx.early.gradients = ctx.early.gradients, None
        return None, *gradients()


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

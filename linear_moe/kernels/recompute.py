"""Run a chunked kernel so that training keeps its inputs and nothing else.

The intermediates of a chunked kernel are several times the size of its inputs, and cheap: the backward pass makes
them again. Only first derivatives exist.

Letters: B batch, T tokens, H heads, L chunks, C tokens in a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from linear_moe.kernels.autocast import without_autocast
from linear_moe.kernels.chunks import Chunks
from linear_moe.kernels.once import once_differentiable

Core = Callable[..., tuple[Tensor | None, ...]]


def recompute(
    core: Core, chunks: Chunks | None, tokens: Sequence[Tensor | None], others: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """``core(*tokens, *others)``, with its intermediates dropped after the forward pass.

    Args:
        core: differentiable; returns the output of every token first (``None`` if it has none), then others.
        chunks: how ``tokens`` and the first output are cut; ``None`` leaves them alone.
        tokens: ``[B, T, H, ...]`` each; ``core`` gets them as ``[L, B, H, C, ...]``.
        others: passed as they are, such as a state.

    Returns:
        What ``core`` returns, the first one as ``[B, T, H, ...]`` in the dtype of ``tokens[0]``. ``core``
        computes in float32, or in float64 when ``tokens[0]`` is float64: all it gets is of that dtype.
    """
    return _Recompute.apply(core, chunks, len(tokens), *tokens, *others)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        # Not by name: torch.compile 2.11 leaves the context out where the others are as many as the names.
        core, chunks, num_tokens, *inputs = arguments
        ctx.core, ctx.chunks, ctx.num_tokens = core, chunks, num_tokens
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        assert inputs[0] is not None
        with without_autocast(inputs[0].device):
            output, *others = core(*enter(chunks, num_tokens, inputs))
        if output is not None:
            output = _join(chunks, output, inputs[0].dtype)
        return output, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        with without_autocast(inputs[0].device):
            local = enter(ctx.chunks, ctx.num_tokens, inputs, needed)
            with torch.enable_grad():
                outputs = ctx.core(*local)
            first = None if grads[0] is None else _split(ctx.chunks, grads[0], local[0].dtype)
            found = gradients(outputs, (first, *grads[1:]), local)
        return None, None, None, *leave(ctx.chunks, ctx.num_tokens, inputs, found)


def enter(
    chunks: Chunks | None,
    num_tokens: int,
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool] | None = None,
) -> list[Any]:
    """Cut the first ``num_tokens`` inputs into chunks, and cast all. Detached; those ``needed`` want gradients."""
    assert inputs[0] is not None
    dtype = torch.promote_types(inputs[0].dtype, torch.float32)
    local: list[Tensor | None] = []
    for position, x in enumerate(inputs):
        is_token = position < num_tokens
        y = None if x is None else _split(chunks if is_token else None, x.detach(), dtype)
        if y is not None and needed is not None:
            y.requires_grad_(needed[position])
        local.append(y)
    return local


def gradients(
    outputs: Sequence[Tensor | None], grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Those of ``inputs`` that want one, from those of ``outputs`` where there are any."""
    given = [(y, dy) for y, dy in zip(outputs, grads) if y is not None and dy is not None and y.requires_grad]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    if not given or not wanted:
        return [None] * len(inputs)
    ys, dys = zip(*given)
    found = iter(torch.autograd.grad(ys, wanted, dys, allow_unused=True))
    return [next(found) if x is not None and x.requires_grad else None for x in inputs]


def leave(
    chunks: Chunks | None,
    num_tokens: int,
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The inverse of :func:`enter`, for gradients of ``inputs``."""
    found: list[Tensor | None] = []
    for position, (x, grad) in enumerate(zip(inputs, grads, strict=True)):
        is_token = position < num_tokens
        assert grad is None or x is not None
        found.append(None if grad is None else _join(chunks if is_token else None, grad, x.dtype))  # type: ignore
    return found


def _split(chunks: Chunks | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if chunks is None else chunks.split(x, dtype)


def _join(chunks: Chunks | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if chunks is None else chunks.join(x, dtype)

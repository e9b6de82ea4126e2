"""Run a chunked kernel so that training keeps its inputs and nothing else.

The intermediates of a chunked kernel are several times the size of its inputs, and cheap: the backward pass makes
them again. Only first derivatives exist.

Letters: B batch, T tokens, H heads, L chunks, C tokens in a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.kernels.arriving import State, meanwhile
from linear_moe.kernels.autocast import without_autocast
from linear_moe.kernels.chunks import Chunks

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
    return _Recompute.apply(core, None, chunks, len(tokens), *tokens, *others)


@dataclass(frozen=True)
class ScanCore:
    """A core in two parts: ``begin`` gets all inputs but the last, the memory, and ``finish`` its result and that."""

    begin: Callable[..., Any]
    finish: Callable[[Any, Tensor | None], tuple[Tensor | None, ...]]

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        """Both."""
        return self.finish(self.begin(*inputs[:-1]), inputs[-1])


def recompute_scan(
    core: ScanCore,
    chunks: Chunks,
    tokens: Sequence[Tensor | None],
    others: Sequence[Tensor | None],
    state: State,
) -> tuple[Tensor | None, ...]:
    """``recompute(core, chunks, tokens, (*others, state))``; while ``state`` is on its way, ``core`` begins."""
    state, begun = meanwhile(state, _begin, core, chunks, len(tokens), (*tokens, *others))
    return _Recompute.apply(core, begun, chunks, len(tokens), *tokens, *others, state)


def _begin(core: ScanCore, chunks: Chunks, num_token_inputs: int, inputs: Sequence[Tensor | None]) -> Any:
    assert inputs[0] is not None
    with without_autocast(inputs[0].device):
        return core.begin(*_enter(chunks, num_token_inputs, inputs))


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, core: Any, begun: Any, chunks: Chunks | None, num_token_inputs: int, *inputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.core, ctx.chunks, ctx.num_token_inputs = core, chunks, num_token_inputs
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        assert inputs[0] is not None
        with without_autocast(inputs[0].device):
            if begun is None:
                output, *others = core(*_enter(chunks, num_token_inputs, inputs))
            else:
                state = inputs[-1]
                wide = None if state is None else _split(None, state.detach(), _dtype(inputs))
                output, *others = core.finish(begun, wide)
        if output is not None:
            output = _join(chunks, output, inputs[0].dtype)
        return output, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:]
        with without_autocast(inputs[0].device):
            local = _enter(ctx.chunks, ctx.num_token_inputs, inputs)
            for x, is_needed in zip(local, needed):
                if x is not None:
                    x.requires_grad_(is_needed)
            with torch.enable_grad():
                outputs = ctx.core(*local)
            first = None if grads[0] is None else _split(ctx.chunks, grads[0], local[0].dtype)
            pairs = [(out, grad) for out, grad in zip(outputs, (first, *grads[1:])) if grad is not None]
            pairs = [(out, grad) for out, grad in pairs if out is not None and out.requires_grad]
            wanted = [x for x, is_needed in zip(local, needed) if is_needed]
            found = iter(
                torch.autograd.grad([p[0] for p in pairs], wanted, [p[1] for p in pairs], allow_unused=True)
                if pairs
                else [None] * len(wanted)
            )
        grad_inputs = []
        for position, (x, is_needed) in enumerate(zip(inputs, needed)):
            grad = next(found) if is_needed else None
            if grad is not None:
                is_token = position < ctx.num_token_inputs
                grad = _join(ctx.chunks if is_token else None, grad, x.dtype)
            grad_inputs.append(grad)
        return None, None, None, None, *grad_inputs


def _enter(chunks: Chunks | None, num_token_inputs: int, inputs: Sequence[Tensor | None]) -> list[Any]:
    """Cut and cast the inputs. Detached, and new tensors where that matters to ``requires_grad_``."""
    dtype = _dtype(inputs)
    local: list[Tensor | None] = []
    for position, x in enumerate(inputs):
        is_token = position < num_token_inputs
        local.append(None if x is None else _split(chunks if is_token else None, x.detach(), dtype))
    return local


def _dtype(inputs: Sequence[Tensor | None]) -> torch.dtype:
    assert inputs[0] is not None
    return torch.promote_types(inputs[0].dtype, torch.float32)


def _split(chunks: Chunks | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if chunks is None else chunks.split(x, dtype)


def _join(chunks: Chunks | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if chunks is None else chunks.join(x, dtype)

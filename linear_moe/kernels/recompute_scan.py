"""Run a chunked scan so that training keeps its inputs and nothing else, and that it starts before its memory is here.

As :mod:`linear_moe.kernels.recompute`, for a kernel in two parts, of which only the second needs the memory.

Letters: B batch, T tokens, H heads, L chunks, C tokens in a chunk, N documents, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from linear_moe.kernels.arriving import Early, State, Tensors, afterwards, meanwhile
from linear_moe.kernels.autocast import without_autocast
from linear_moe.kernels.chunks import Chunks
from linear_moe.kernels.once import once_differentiable
from linear_moe.kernels.recompute import enter, gradients, leave


@dataclass(frozen=True)
class Scan:
    """A kernel in two parts; differentiable."""

    begin: Callable[..., Any]
    """From tokens ``[L, B, H, C, ...]`` and others to tensors, in a tuple; some may be ``None``."""
    finish: Callable[[Any, Tensor | None], tuple[Tensor, Tensor]]
    """From that and the memory ``[N, H, K, V]`` to outputs ``[L, B, H, C, V]`` and the final memory."""
    chunks: Chunks
    num_tokens: int
    """How many inputs are tokens."""

    def start(self, *inputs: Tensor | None) -> Any:
        """The first part, from ``[B, T, H, ...]``."""
        assert inputs[0] is not None
        with without_autocast(inputs[0].device):
            return self.begin(*enter(self.chunks, self.num_tokens, inputs))


def recompute_scan(scan: Scan, inputs: Tensors, state: State) -> tuple[Tensor, Tensor]:
    """Outputs ``[B, T, H, V]`` in the dtype of ``inputs[0]``, and the final memory, at least float32.

    Args:
        scan: see there.
        inputs: ``[B, T, H, ...]`` of tokens, then others.
        state: the memory before the first token.
    """
    memory, inputs, early = meanwhile(state, scan.start, inputs)
    return cast(tuple[Tensor, Tensor], _RecomputeScan.apply(scan, early, memory, *inputs))


class _RecomputeScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scan: Scan, early: Early | None, state: Tensor | None, *inputs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.scan, ctx.early = scan, early
        ctx.save_for_backward(state, *inputs)
        ctx.set_materialize_grads(False)
        assert inputs[0] is not None
        begun = early.take() if early else scan.start(*inputs)
        with without_autocast(inputs[0].device):
            output, final = scan.finish(begun, _memory(state, inputs[0]))
        return scan.chunks.join(output, inputs[0].dtype), final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor | None, d_final: Tensor | None) -> tuple[Any, ...]:
        state, *inputs = ctx.saved_tensors
        scan: Scan = ctx.scan
        needs_state, *needed = ctx.needs_input_grad[2:]
        with without_autocast(inputs[0].device):
            local = enter(scan.chunks, scan.num_tokens, inputs, needed)
            memory = _memory(state, inputs[0])
            if memory is not None:
                memory.requires_grad_(needs_state)
            grads = None if d_output is None else scan.chunks.split(d_output, local[0].dtype), d_final
            steps = _in_one_step if ctx.early is None else _in_two_steps
            d_memory, rest = steps(scan, local, memory, grads)

        def of_inputs() -> Tensors:
            with without_autocast(inputs[0].device):
                found = rest()
            return tuple(leave(scan.chunks, scan.num_tokens, inputs, found))

        d_state = None if d_memory is None else d_memory.to(state.dtype)
        return None, None, d_state, *afterwards(ctx.early, of_inputs, len(inputs))


Gradients = tuple[Tensor | None, Callable[[], list[Tensor | None]]]
"""The memory's gradient, and a function that computes those of the inputs."""


def _in_one_step(scan: Scan, local: list[Any], memory: Tensor | None, grads: Tensors) -> Gradients:
    with torch.enable_grad():
        outputs = scan.finish(scan.begin(*local), memory)
    *found, d_memory = gradients(outputs, grads, (*local, memory))
    return d_memory, lambda: found


def _in_two_steps(scan: Scan, local: list[Any], memory: Tensor | None, grads: Tensors) -> Gradients:
    """The memory's gradient first. Those of the inputs come later, from what ``begin`` gave: a tenth more memory."""
    with torch.enable_grad():
        begun = scan.begin(*local)
        leaves = [None if x is None else x.detach().requires_grad_(x.requires_grad) for x in begun]
        outputs = scan.finish(tuple(leaves), memory)
    *found, d_memory = gradients(outputs, grads, (*leaves, memory))
    return d_memory, lambda: gradients(begun, found, local)


def _memory(state: Tensor | None, like: Tensor) -> Tensor | None:
    """Detached, in the dtype of the computation; a new tensor."""
    return None if state is None else state.detach().to(torch.promote_types(like.dtype, torch.float32))

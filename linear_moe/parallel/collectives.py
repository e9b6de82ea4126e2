"""The one collective of context parallelism: all-gather forward, reduce-scatter (sum) backward.

Each is started by one node of autograd and waited for by the other one, in turn:

    forward     _Start starts the all-gather          ...     _Finish waits for it
    backward    _Start waits for the reduce-scatter   ...     _Finish starts it

What is enqueued between the two calls runs meanwhile, and so does the backward pass of what autograd records there.

Weights are replicated over the context-parallel group and Megatron averages gradients over data x context parallel
ranks, so the backward sum is not divided here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Gathering:
    """An all-gather on its way."""

    def __init__(self, x: Tensor, group: dist.ProcessGroup) -> None:
        self.group = group
        self.work: dist.Work
        """What is on its way: the all-gather, and backward the reduce-scatter."""
        self.own_gradient: Tensor
        """What the reduce-scatter fills."""
        self._gathered = _Start.apply(x, self)

    def wait(self) -> Tensor:
        """``[R, n, ...]``: on a GPU its stream waits, on a CPU the caller."""
        gathered = _Finish.apply(self._gathered, self)
        del self._gathered
        return gathered.unflatten(0, (self.group.size(), -1))


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gathering: Gathering) -> Tensor:
        ctx.gathering = gathering
        x = x.contiguous()
        gathered = x.new_empty(gathering.group.size() * x.shape[0], *x.shape[1:])
        gathering.work = dist.all_gather_into_tensor(gathered, x, group=gathering.group, async_op=True)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.gathering.work.wait()
        own = ctx.gathering.own_gradient
        del ctx.gathering.work, ctx.gathering.own_gradient
        return own, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gathered: Tensor, gathering: Gathering) -> Tensor:
        ctx.gathering = gathering
        gathering.work.wait()
        del gathering.work
        return gathered.view_as(gathered)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        grad, gathering = grad.contiguous(), ctx.gathering
        own = grad.new_empty(grad.shape[0] // gathering.group.size(), *grad.shape[1:])
        gathering.work = dist.reduce_scatter_tensor(own, grad, group=gathering.group, async_op=True)
        gathering.own_gradient = own
        return grad, None  # autograd wants a gradient of this shape; _Start returns the reduce-scattered one


def start_all_gather(x: Tensor, group: dist.ProcessGroup) -> Gathering:
    """:func:`all_gather` in two steps: this starts it, and ``wait`` of the result gives what was gathered."""
    return Gathering(x, group)


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[n, ...]`` on every rank to ``[R, n, ...]``; the gradient is the sum of every rank's, reduce-scattered."""
    return start_all_gather(x, group).wait()

"""The one collective of context parallelism: all-gather forward, reduce-scatter (sum) backward.

Weights are replicated over the context-parallel group and Megatron averages gradients over data x context parallel
ranks, so the backward sum is not divided here (``notes/megatron.md`` 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllGather(torch.autograd.Function):
    """Started, not waited for: ``works`` gets what has to be waited for before the result is read."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, works: list[dist.Work]) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        gathered = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        works.append(dist.all_gather_into_tensor(gathered, x, group=group, async_op=True))
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        grad = grad.contiguous()
        own = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad, group=ctx.group)
        return own, None, None


@dataclass(frozen=True)
class Gathering:
    """An all-gather on its way."""

    gathered: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        """``[R, n, ...]``: on a GPU its stream waits, on a CPU the caller does."""
        self.work.wait()
        return self.gathered


def start_all_gather(x: Tensor, group: dist.ProcessGroup) -> Gathering:
    """:func:`all_gather` in two calls: what is enqueued before its ``wait`` runs meanwhile."""
    works: list[dist.Work] = []
    gathered = _AllGather.apply(x, group, works).unflatten(0, (group.size(), x.shape[0]))
    return Gathering(gathered, works[0])


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[n, ...]`` on every rank to ``[R, n, ...]``; the gradient is the sum of every rank's, reduce-scattered."""
    return start_all_gather(x, group).wait()

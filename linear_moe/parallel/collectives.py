"""The one collective of context parallelism: all-gather forward, reduce-scatter (sum) backward.

Weights are replicated over the context-parallel group and Megatron averages gradients over data x context parallel
ranks, so the backward sum is not divided here (``notes/megatron.md`` 3.3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        gathered = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(gathered, x, group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        grad = grad.contiguous()
        own = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(own, grad, group=ctx.group)
        return own, None


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[n, ...]`` on every rank to ``[R, n, ...]``; the gradient is the sum of every rank's, reduce-scattered."""
    return _AllGather.apply(x, group).unflatten(0, (group.size(), x.shape[0]))

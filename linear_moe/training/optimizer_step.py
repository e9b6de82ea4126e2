"""What Megatron's optimizer does with torch alone, as a few kernels over all parameters: norm, clipping, Adam.

Transformer Engine and Apex have kernels over lists of tensors. Without them Megatron goes from parameter to parameter:
it waits for the norm of each gradient, scales each into a copy of it that it copies back, and builds torch's Adam
as one kernel per operation, ten of which read and write every state. linear_moe.training.engine assigns these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linear_moe.training import one_pass

ADAM = (torch.optim.Adam, torch.optim.AdamW)


def norm_of_all(original: Callable) -> Callable:
    """``l2_norm_impl``: the norm of all tensors of all lists, ``[1]``, and nothing; nobody waits for it here."""

    def norm(
        chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], *others: Any
    ) -> tuple[Tensor, None]:
        return torch.nn.utils.get_total_norm([x for tensors in lists for x in tensors]).reshape(1), None

    return norm


def scale_all(original: Callable) -> Callable:
    """``multi_tensor_scale_impl``: one list of tensors into another, which is the same where gradients are clipped."""

    def scale(chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], factor: float) -> None:
        source, target = lists
        if any(x is not y for x, y in zip(source, target, strict=True)):
            torch._foreach_copy_(target, source)
        torch._foreach_mul_(target, factor)

    return scale


def fuse_adam(original: Callable) -> Callable:
    """``_get_megatron_optimizer_based_on_param_groups``: torch's Adam as one kernel, large parameters by one of ours.

    The choice is made before every step anew: loading a checkpoint brings that of the saved run, and steps that are
    counted on the other device.
    """

    @functools.wraps(original)
    def build(*args: Any, **kwargs: Any) -> Any:
        optimizer = original(*args, **kwargs)
        inner = getattr(optimizer, "optimizer", None)
        if isinstance(inner, ADAM):
            inner.register_step_pre_hook(_choose_fused)
            one_pass.install(optimizer)
        return optimizer

    return build


def _choose_fused(inner: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in inner.param_groups:
        group["fused"] = all(_can_fuse(param) for param in group["params"])
        for param in group["params"]:
            state = inner.state.get(param, {})
            if "step" in state and param.grad is not None:  # a fused step counts where the weights are
                state["step"] = state["step"].to(param.device if group["fused"] else "cpu")


def _can_fuse(param: Tensor) -> bool:
    return param.is_cuda

"""What Megatron's optimizer does with torch alone, as a few kernels over all parameters: norm, clipping, Adam.

Transformer Engine and Apex have kernels over lists of tensors. Without them Megatron goes from parameter to parameter:
it waits for the norm of each gradient, scales each into a copy of it that it copies back, and builds torch's Adam
as one kernel per operation, ten of which read and write every state. linear_moe.training.engine assigns these.

Megatron also clears the sums of gradients before every step, and then reads the zeros in order to add to them. Here a
sum is left *stale*: what autograd brings first overwrites it, and what nothing was written to is cleared before
gradients are reduced, which is when they are first read. That saves 8 of 24 bytes an element in steps of two
micro-batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linear_moe.model.gradient_sums import STALE, WRITTEN
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


# Sums of gradients. A sum stays stale only in buffers whose step ends in Megatron's own reduction, and to which only
# the hook below adds: products of Apex that add in place, and graphs that hold such an addition, need the zeros.


def leave_sums(original: Callable) -> Callable:
    """``DistributedDataParallel.zero_grad_buffer`` tells its buffers whether they may leave sums stale."""

    @functools.wraps(original)
    def zero_grad_buffer(self: Any) -> None:
        from megatron.core.distributed import finalize_model_grads

        config = self.config
        is_reduced = config.finalize_model_grads_func is finalize_model_grads
        adds_elsewhere = config.gradient_accumulation_fusion or config.cuda_graph_impl != "none"
        for buffer in (*self.buffers, *self.expert_parallel_buffers):
            buffer.may_be_stale = is_reduced and not adds_elsewhere
        original(self)

    return zero_grad_buffer


def mark_stale(original: Callable) -> Callable:
    """``_ParamAndGradBuffer.reset`` writes nothing; what lies between parameters is zero from the start."""

    @functools.wraps(original)
    def reset(self: Any) -> None:
        may_be_stale = getattr(self, "may_be_stale", False)
        if not (may_be_stale and all(hasattr(param, STALE) for param in self.params)):
            original(self)
            return
        for param in self.params:
            setattr(param, STALE, True)
            setattr(param, WRITTEN, False)  # by a backward pass that was broken off before the hook

    return reset


def overwrite_stale(original: Callable) -> Callable:
    """``_make_backward_post_hook``: its hook finds the first gradient of a step, and what is written, in the sum."""

    @functools.wraps(original)
    def make(self: Any, param: torch.nn.Parameter) -> Callable[..., None]:
        add = original(self, param)
        setattr(param, STALE, False)
        setattr(param, WRITTEN, False)

        def hook(*unused: Any) -> None:
            is_written = getattr(param, WRITTEN)
            if param.grad is None or not (is_written or getattr(param, STALE)):
                return add(*unused)
            if getattr(param, "zero_out_wgrad", False):  # added whatever is said of it: tied embeddings
                _clear_stale([param])
                return add(*unused)
            if not is_written:
                param.main_grad.copy_(param.grad.data)  # type: ignore[attr-defined]
            setattr(param, STALE, False)
            setattr(param, WRITTEN, False)
            param.grad_added_to_main_grad = True  # type: ignore[attr-defined]
            try:
                add(*unused)
            finally:
                param.grad_added_to_main_grad = False  # type: ignore[attr-defined]

        return hook

    return make


def clear_stale(original: Callable) -> Callable:
    """``_ParamAndGradBucketGroup.start_grad_sync`` clears what no micro-batch had a gradient of."""

    @functools.wraps(original)
    def start_grad_sync(self: Any, *args: Any, **kwargs: Any) -> None:
        _clear_stale([param for param in self.params if getattr(param, STALE, False)])
        original(self, *args, **kwargs)

    return start_grad_sync


def _clear_stale(params: list[torch.nn.Parameter]) -> None:
    for param in params:
        setattr(param, STALE, False)
    if params:
        torch._foreach_zero_([param.main_grad for param in params])  # type: ignore[attr-defined]

"""The optimizer's step on a GPU in one pass: clipping, Adam and the copy in half precision by one kernel.

Megatron scales the gradients, has torch step the float32 parameters and copies them into the model's: 42 bytes of
traffic an element. :func:`linear_moe.kernels.adam_` takes 30. So clipping waits: a large parameter is told the factor
of its gradient, which stays as it is, since nobody reads it between clipping and the step or after it, but
``--log-num-zeros-in-grad``, with which all is as in Megatron. Small parameters, a launch each, stay with torch's kernel
over lists of them, and so does everything where the fused kernel cannot run.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from linear_moe.kernels import dispatch

LARGE = 2**20
"""Elements from which a parameter is worth a launch: 10 us of an H100, and 20 us of the host."""

FACTOR = "factor_of_gradient"
"""Attribute of parameters whose clipping waits for the step: by what their gradient is still to be multiplied."""

UNUSUAL = ("amsgrad", "maximize", "capturable", "differentiable")
"""Options of torch's Adam that the kernel does not have."""

Copies = Callable[[Any], Iterator[tuple[Tensor, Tensor]]]


def install(optimizer: Any) -> None:
    """Have one of Megatron's optimizers, over torch's Adam, step in one pass if a kernel can run there."""
    copies, config = _copies_of(optimizer), optimizer.config
    params = [param for group in optimizer.optimizer.param_groups for param in group["params"]]
    has_own_ways = config.log_num_zeros_in_grad or config.optimizer_cuda_graph
    if copies is None or not params or has_own_ways or not _has_kernel(params[0]):
        return
    for param in params:
        setattr(param, FACTOR, 1.0)
    one_pass = _OnePass(optimizer, copies)
    optimizer.step_with_ready_grads = one_pass.step
    optimizer._copy_main_params_to_model_params = one_pass.copy_rest  # never called by Megatron's float32 one


def clip_later(original: Callable) -> Callable:
    """``clip_grad_by_total_norm_fp32`` tells the factor to parameters that can wait, and scales gradients of others."""

    @functools.wraps(original)
    def clip(parameters: Any, max_norm: float, total_norm: float, *args: Any, **kwargs: Any) -> None:
        every = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        factor = max_norm / (total_norm + 1e-6)  # as in the original; where the norm is NaN it does nothing
        for param in every:
            if hasattr(param, FACTOR):
                setattr(param, FACTOR, factor if factor < 1.0 else 1.0)
        others = [param for param in every if not hasattr(param, FACTOR)]
        if others:
            original(others, max_norm, total_norm, *args, **kwargs)

    return clip


def _has_kernel(param: Tensor) -> bool:
    return dispatch.pick("adam_", param.device, param.dtype).name == "triton"


class _OnePass:
    """Stands in for two methods of one of Megatron's optimizers."""

    def __init__(self, optimizer: Any, copies: Copies) -> None:
        self.optimizer, self.copies = optimizer, copies
        self.rest: list[tuple[Tensor, Tensor]] = []
        self.stock_step = optimizer.step_with_ready_grads

    @torch.no_grad()
    def step(self) -> Any:
        """``step_with_ready_grads``: the large parameters, then the stock one for those that still have gradients."""
        inner, pairs = self.optimizer.optimizer, list(self.copies(self.optimizer))
        halves = {id(main): half for main, half in pairs}
        done: dict[int, tuple[Tensor, Tensor | None]] = {}
        scaled: dict[float, list[Tensor]] = defaultdict(list)
        for group in inner.param_groups:
            for param in group["params"]:
                factor = getattr(param, FACTOR)
                setattr(param, FACTOR, 1.0)
                if param.grad is None:
                    continue
                if _is_large(param, group) and _step_one(inner, group, param, halves.get(id(param)), factor):
                    done[id(param)], param.grad = (param, param.grad), None
                elif factor != 1.0:
                    scaled[factor].append(param.grad)
        for factor, grads in scaled.items():
            torch._foreach_mul_(grads, factor)
        self.rest = [pair for pair in pairs if id(pair[0]) not in done]
        try:
            return self.stock_step()
        finally:
            for param, grad in done.values():
                param.grad = grad

    def copy_rest(self) -> None:
        """``_copy_main_params_to_model_params``, inside of the stock step: what the kernel has not written."""
        if self.rest:
            mains, halves = zip(*self.rest, strict=True)
            torch._foreach_copy_(halves, mains)


def _is_large(param: Tensor, group: dict[str, Any]) -> bool:
    is_usual = not any(group.get(name) for name in UNUSUAL) and not isinstance(group["lr"], Tensor)
    return is_usual and param.numel() >= LARGE


def _step_one(
    inner: torch.optim.Optimizer, group: dict[str, Any], param: Tensor, half: Tensor | None, factor: float
) -> bool:
    """Whether the kernel took it; states are torch's, but steps are counted on the host, which needs them."""
    state = inner.state[param]
    if not state:
        zeros = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
        state |= {"step": torch.tensor(0.0), **zeros}
    step = state["step"].cpu() + 1
    beta1, beta2 = group["betas"]
    options = {name: float(group[name]) for name in ("lr", "eps", "weight_decay")}
    tensors = [param, param.grad, state["exp_avg"], state["exp_avg_sq"], *([] if half is None else [half])]
    if not all(x.is_contiguous() for x in tensors):
        return False
    run = dispatch.fused(
        "adam_", *(x.view(-1) for x in tensors), step=step, beta1=beta1, beta2=beta2, **options,
        decoupled=bool(group["decoupled_weight_decay"]), factor=factor,
    )  # fmt: skip
    if run is None:
        return False
    run()
    state["step"] = step
    return True


def _copies_of(optimizer: Any) -> Copies | None:
    """For a kind of optimizer, what yields its parameters in float32 with the model's, which become their copies."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    if type(optimizer) is DistributedOptimizer:
        return None if optimizer.ddp_config.use_megatron_fsdp else _of_shards
    return {FP32Optimizer: _of_none, Float16OptimizerWithFloat16Params: _of_all}.get(type(optimizer))


def _of_shards(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Places in the buffers that are gathered; shards of the model's float32 parameters are there already."""
    groups = zip(optimizer.shard_fp32_from_float16_groups, optimizer.model_float16_groups, strict=True)
    for main, model in itertools.chain.from_iterable(map(_pairs, groups)):
        here = optimizer._get_model_param_range_map(model)["gbuf_world_in_bucket"]
        index, _, bucket = optimizer.model_param_gbuf_map[model]
        yield main, optimizer.buffers[index].buckets[bucket].param_data.view(-1)[here.start : here.end]


def _of_all(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    groups = zip(optimizer.fp32_from_float16_groups, optimizer.float16_groups, strict=True)
    for main, model in itertools.chain.from_iterable(map(_pairs, groups)):
        yield main, model.data


def _of_none(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    return iter(())


def _pairs(group: tuple[list[Tensor], list[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(*group, strict=True)

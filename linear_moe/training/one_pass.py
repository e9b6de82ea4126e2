"""The optimizer's step on a GPU in one pass: clipping, Adam and the copy in half precision by one kernel.

Megatron scales the gradients, has torch step the float32 parameters and copies them into the model's: 42 bytes of
traffic an element. :func:`linear_moe.kernels.adam_` takes 30. So clipping waits: a large parameter is told the factor
of its gradient, which stays as it is, since nobody reads it between clipping and the step or after it, but
``--log-num-zeros-in-grad``, with which all is as in Megatron. Small parameters, a launch each, stay with torch's kernel
over lists of them, and so does everything where the fused kernel cannot run.

The host is slower than the GPU here, and waits for the gradients' norm first. So what does not depend on that is done
before, anew in every step, and the large parameters of all optimizers are launched before anything else.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

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

Runs = dict[tuple[Any, ...], partial | None]
"""Whether the kernel takes tensors of a kind, and the call that it was asked about; asking costs 0.1 ms."""


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
    optimizer.one_pass, optimizer.prepare_grads = one_pass, one_pass.prepare
    optimizer.step_with_ready_grads = one_pass.step
    optimizer._copy_main_params_to_model_params = one_pass.copy_rest  # never called by Megatron's float32 one


def clip_later(original: Callable) -> Callable:
    """``clip_grad_by_total_norm_fp32`` tells the factor to parameters that can wait, and scales gradients of others."""

    @functools.wraps(original)
    def clip(parameters: Any, max_norm: float, total_norm: float, *args: Any, **kwargs: Any) -> None:
        every = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        factor = max_norm / (total_norm + 1e-6)  # as in the original; where the norm is NaN it does nothing
        factor = factor if factor < 1.0 else 1.0
        others = []
        for param in every:
            if hasattr(param, FACTOR):
                setattr(param, FACTOR, factor)
            else:
                others.append(param)
        if others:
            original(others, max_norm, total_norm, *args, **kwargs)

    return clip


def large_first(original: Callable) -> Callable:
    """``ChainedOptimizer.step_with_ready_grads`` begins with the large parameters of all its optimizers.

    They keep the GPU busy while the host goes through the small ones, the copies and the gathers.
    """

    @functools.wraps(original)
    def step(self: Any) -> Any:
        # With that option the first one's parameters are gathered beside the steps of the others.
        if not self.config.overlap_param_gather_with_optimizer_step:
            launch_large([one.one_pass for one in self.chained_optimizers if hasattr(one, "one_pass")])
        return original(self)

    return step


@torch.no_grad()
def launch_large(passes: list[_OnePass]) -> None:
    """Of some optimizers, the largest first, unless it is done."""
    plans = [plan for one in passes if not (plan := one.plan()).is_launched]
    for plan in plans:
        plan.is_launched = True
    for large in sorted((large for plan in plans for large in plan.large), key=_Large.size, reverse=True):
        large.launch()


def _has_kernel(param: Tensor) -> bool:
    return dispatch.pick("adam_", param.device, param.dtype).name == "triton"


@dataclass
class _Large:
    """A step of one large parameter by the kernel, of which only the factor of the gradient is still unknown."""

    param: Tensor
    half: Tensor | None
    state: dict[str, Any]
    step: Tensor
    run: Callable[..., None]

    def size(self) -> int:
        return self.param.numel()

    def launch(self) -> None:
        """The factor is that of this step alone."""
        self.run(factor=getattr(self.param, FACTOR))
        setattr(self.param, FACTOR, 1.0)
        self.state["step"] = self.step


class _Plan:
    """What one step of an optimizer launches: the ``large`` parameters, and ``rest``, which torch steps and copies."""

    def __init__(self, optimizer: Any, copies: Copies) -> None:
        inner, pairs = optimizer.optimizer, list(copies(optimizer))
        halves = {id(main): half for main, half in pairs}
        self.large: list[_Large] = []
        self.rest: list[Tensor] = []
        runs: Runs = {}
        for group in inner.param_groups:
            for param in group["params"]:
                large = _prepare_large(inner, group, param, halves.get(id(param)), runs)
                if large is None:
                    self.rest.append(param)
                else:
                    self.large.append(large)
        done = {id(large.param) for large in self.large}
        self.pairs = [pair for pair in pairs if id(pair[0]) not in done]
        self.is_launched = False


class _OnePass:
    """Stands in for three methods of one of Megatron's optimizers."""

    def __init__(self, optimizer: Any, copies: Copies) -> None:
        self.optimizer, self.copies = optimizer, copies
        self.stock_prepare, self.stock_step = optimizer.prepare_grads, optimizer.step_with_ready_grads
        self.planned: _Plan | None = None
        """Of this step. Never of an earlier one: a checkpoint or an offload may have exchanged any tensor since."""

    @torch.no_grad()
    def prepare(self) -> bool:
        """``prepare_grads``, and all of the step that can be done before the host waits for the gradients' norm."""
        self.planned = None
        has_overflow = self.stock_prepare()
        if not has_overflow and self._has_states():
            self.planned = _Plan(self.optimizer, self.copies)
        return has_overflow

    def _has_states(self) -> bool:
        """Of all parameters; before the first step there are none, and one that is skipped must not make them."""
        inner = self.optimizer.optimizer
        params = (param for group in inner.param_groups for param in group["params"])
        return all(inner.state.get(param) for param in params if param.grad is not None)

    def plan(self) -> _Plan:
        """As prepared."""
        if self.planned is None:
            self.planned = _Plan(self.optimizer, self.copies)
        return self.planned

    @torch.no_grad()
    def step(self) -> Any:
        """``step_with_ready_grads``: the large parameters, then the stock one for those that still have gradients."""
        launch_large([self])
        plan = self.plan()
        scaled: dict[float, list[Tensor]] = defaultdict(list)
        for param in plan.rest:
            factor = getattr(param, FACTOR)
            setattr(param, FACTOR, 1.0)
            if factor != 1.0 and param.grad is not None:
                scaled[factor].append(param.grad)
        for factor, grads in scaled.items():
            torch._foreach_mul_(grads, factor)
        stepped = [(large.param, large.param.grad) for large in plan.large]
        for param, _ in stepped:
            param.grad = None
        try:
            return self.stock_step()
        finally:
            self.planned = None
            for param, grad in stepped:
                param.grad = grad

    def copy_rest(self) -> None:
        """``_copy_main_params_to_model_params``, inside of the stock step: what the kernel has not written."""
        if self.plan().pairs:
            mains, halves = zip(*self.plan().pairs, strict=True)
            torch._foreach_copy_(halves, mains)


def _is_large(param: Tensor, group: dict[str, Any]) -> bool:
    is_usual = not any(group.get(name) for name in UNUSUAL) and not isinstance(group["lr"], Tensor)
    return is_usual and param.numel() >= LARGE


def _prepare_large(
    inner: torch.optim.Optimizer, group: dict[str, Any], param: Tensor, half: Tensor | None, runs: Runs
) -> _Large | None:
    """``None``: not for the kernel. States are torch's, but steps are counted on the host, which needs them."""
    if param.grad is None or not _is_large(param, group):
        return None
    state = inner.state[param]
    if not state:
        zeros = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
        state |= {"step": torch.tensor(0.0), **zeros}
    tensors = [param, param.grad, state["exp_avg"], state["exp_avg_sq"], *([] if half is None else [half])]
    if not all(x.is_contiguous() for x in tensors):
        return None
    step = state["step"].cpu() + 1
    beta1, beta2 = group["betas"]
    options = {name: float(group[name]) for name in ("lr", "eps", "weight_decay")}
    options |= dict(beta1=beta1, beta2=beta2, decoupled=bool(group["decoupled_weight_decay"]), step=step)
    kind = (options["decoupled"], *((type(x), x.dtype, x.device) for x in tensors))
    if kind not in runs:
        flat = [x.view(-1) for x in tensors]  # one trial for parameters of any shape
        runs[kind] = cast("partial | None", dispatch.fused("adam_", *flat, factor=1.0, **options))
    picked = runs[kind]
    if picked is None:
        return None
    return _Large(param, half, state, step, partial(picked.func, *tensors, **options))


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

"""The few assignments into Megatron-Core 0.19, made where it has no hook; each with its reason, all in this file.

``install`` makes eleven kinds: a wheel without its Makefile may start; a run resumes bit-exactly, without Transformer
Engine and Apex and with expert parallelism; its saves start no process; gradient norm, clipping and Adam's step are a
few kernels then, too, and the first gradient of a step is written where others are added; gradients are summed on the
stream that makes them; a step's figures are read while the optimizer runs; the first loss of a run is logged once; a
step is logged with the learning rate that it used, and the schedule ends with the run; FLOPs and metrics are ours.
``defaults_without_te`` is the other half: the flags that a run must set where Transformer Engine or a CUDA device is
missing.
"""

import functools
import importlib
import importlib.util
import queue
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from linear_moe.training import cpu, figures_stream, one_pass, optimizer_step
from linear_moe.training.optimizer_step import ADAM

SUPPORTED = (0, 19)
"""Megatron-Core (major, minor) that the assignments below were written against."""

OPTIONAL_MODULES = (
    "transformer_engine",
    "fused_weight_gradient_mlp_cuda",
    "scaled_upper_triang_masked_softmax_cuda",
)
"""What decides over ``defaults_without_te``: Transformer Engine, and two CUDA extensions of Apex."""

EXPERTS_RNG = "linear_moe_rng_of_experts"
"""Key, in a checkpoint's RNG state, of the experts' states by data-parallel rank."""

_originals: dict[tuple[Any, str], Any] = {}

_used_rates: list[float | None] = []
"""Learning rate of the last step, once there was one."""


def install(
    *,
    flops: Callable | None = None,
    training_log: Callable[[Callable], Callable] | None = None,
    evaluation: Mapping[str, Callable[[Callable], Callable]] | None = None,
) -> None:
    """Make the assignments; calling it again only replaces `flops`, `training_log` and `evaluation`.

    Args:
        flops: takes the place of ``megatron.training.training.num_floating_point_operations``, with its arguments.
        training_log: takes the stock ``training_log`` and returns its replacement, with the same arguments.
        evaluation: the same for ``evaluate`` and ``evaluate_and_print_results``, by name.

    Raises:
        ValueError: another version of Megatron-Core, or a wheel without the compiled dataset helpers.
    """
    import megatron.core.datasets.utils as datasets
    import megatron.core.dist_checkpointing.strategies.filesystem_async as writers
    import megatron.core.distributed.distributed_data_parallel as ddp
    import megatron.core.distributed.param_and_grad_buffer as gradients
    import megatron.core.optimizer as optimizers
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.optimizer.distrib_optimizer as distributed
    import megatron.core.optimizer.optimizer as optimizer_module
    import megatron.training.checkpointing as checkpointing
    import megatron.training.training as training

    check_version()
    if not (Path(datasets.__file__).parent / "Makefile").exists():
        _assign(datasets, "compile_helpers", lambda original: check_compiled_helpers)
    optimizer = distributed.DistributedOptimizer
    _assign(optimizer, "_build_optimizer_group_ranges", _number_float32_parameters_first)
    _assign(optimizer, "sharded_param_state_fully_reshardable", _cut_states_where_they_are)
    if not distributed.HAVE_APEX_OR_TE:
        _assign(optimizer, "state_dict", _state_dict_of_a_fresh_optimizer)
        _assign(optimizer, "load_state_dict", _load_state_dict_with_own_steps)
        _assign(optimizer, "_set_main_param_and_optimizer_states", _set_states_but_the_step)
        _assign(optimizers, "_get_megatron_optimizer_based_on_param_groups", optimizer_step.fuse_adam)
        _assign(clip_grads, "l2_norm_impl", optimizer_step.norm_of_all)
        _assign(clip_grads, "multi_tensor_scale_impl", optimizer_step.scale_all)
        _assign(optimizer_module, "clip_grad_by_total_norm_fp32", one_pass.clip_later)
        _assign(optimizer_module.ChainedOptimizer, "step_with_ready_grads", one_pass.large_first)
        _assign(ddp.DistributedDataParallel, "zero_grad_buffer", optimizer_step.leave_sums)
        _assign(ddp.DistributedDataParallel, "_make_backward_post_hook", optimizer_step.overwrite_stale)
        _assign(gradients._ParamAndGradBuffer, "reset", optimizer_step.mark_stale)
        _assign(gradients._ParamAndGradBucketGroup, "start_grad_sync", optimizer_step.clear_stale)
    _assign(ddp.DistributedDataParallel, "__init__", _sum_gradients_where_they_are_made)
    _assign(writers, "get_write_results_queue", _queue_of_one_process)
    _assign(checkpointing, "get_rng_state", _save_rng_of_experts)
    _assign(checkpointing, "_load_base_checkpoint", _load_rng_of_experts)
    _assign(training, "load_checkpoint", _end_the_schedule_with_the_run)
    _assign(training, "train_step", lambda o: figures_stream.open_after_optimizer(_note_learning_rate(o)))
    for name in figures_stream.READ_WEIGHTS:
        _assign(training, name, figures_stream.close_before)
    _assign(training, "get_canonical_lr_for_logging", _learning_rate_of_step)
    _assign(training, "training_log", _log_first_iteration_once)
    _assign(training, "logical_and_across_model_parallel_group", _and_over_one_rank)
    _assign(training, "reduce_max_stat_across_model_parallel_group", _largest_of_one_rank)
    log = training.training_log if training_log is None else training_log(training.training_log)
    training.training_log = figures_stream.close_after(log)
    for name, replacement in (evaluation or {}).items():
        _assign(training, name, replacement)
    if flops is not None:
        _assign(training, "num_floating_point_operations", lambda original: flops)


def _assign(owner: Any, name: str, replacement: Callable[[Any], Any]) -> None:
    """``owner.name = replacement(the stock owner.name)``, however often it is called."""
    _originals.setdefault((owner, name), getattr(owner, name))
    setattr(owner, name, replacement(stock(owner, name)))


def stock(owner: Any, name: str) -> Any:
    """What ``owner.name`` is in Megatron itself, assigned to or not."""
    return _originals.get((owner, name), getattr(owner, name))


def check_version() -> None:
    """Refuse a Megatron-Core that this file was not written against.

    Raises:
        ValueError: another (major, minor) than ``SUPPORTED``.
    """
    from megatron.core import package_info

    found = (package_info.MAJOR, package_info.MINOR)
    if found != SUPPORTED:
        raise ValueError(
            f"megatron-core {package_info.__shortversion__} is installed\n"
            f"  why: linear_moe corrects details of 0.19 (the optimizer's resume, the loss log) that may differ there\n"
            f"  try: pip install 'megatron-core[training]==0.19.2'"
        )


def check_compiled_helpers() -> None:
    """Stands in for ``compile_helpers``, which runs make: the wheel holds the compiled module, and no Makefile.

    Raises:
        ValueError: the compiled module does not import.
    """
    try:
        importlib.import_module("megatron.core.datasets.helpers_cpp")
    except ImportError as error:
        raise ValueError(
            f"Megatron's compiled dataset helpers do not import\n"
            f"  why: {error}; without them no token file can be read\n"
            f"  try: pip install --force-reinstall --no-deps megatron-core==0.19.2, for this Python"
        ) from error


def _number_float32_parameters_first(original: Callable) -> Any:
    """``_build_optimizer_group_ranges`` numbers a group's parameters as its buffers hold them.

    The optimizer that is made from them lists float32 parameters first (``_build_model_and_main_param_groups``). In a
    half-precision model with float32 gates the numbers then name other parameters, and a checkpoint holds the state of
    the wrong ones, or cannot be written.
    """

    @functools.wraps(original)
    def build(param_groups: list[dict], gbuf_ranges: list[dict]) -> tuple[dict, list[dict]]:
        numbers, group_ranges = original(param_groups, gbuf_ranges)
        for group in group_ranges:
            group["params"].sort(key=lambda param: param.dtype != torch.float32)  # stable
            for number, param in enumerate(group["params"]):
                numbers[param] = (numbers[param][0], number)
        return numbers, group_ranges

    return staticmethod(build)


def _sum_gradients_where_they_are_made(original: Callable) -> Callable:
    """``DistributedDataParallel.__init__`` makes the nodes that take gradients on the stream of the backward pass.

    Autograd runs a node on the stream on which it was made, which for these is one that Megatron made for this call
    alone. A gradient that comes from another stream is waited for, parameter by parameter, and its memory cannot be
    used again before an event behind its sum has passed: 5 GiB of gradients were pending in a step of
    ``MODEL_SIZE=A0.3B``, since the host is ahead, and PyTorch's allocator emptied its cache about once a step.
    CUDA graphs keep what Megatron chose for them.
    """

    @functools.wraps(original)
    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        if cpu.is_active() or not torch.cuda.is_available() or config.cuda_graph_impl != "none":
            return original(self, config, *args, **kwargs)
        with torch.cuda.stream(torch.cuda.default_stream()):
            return original(self, config, *args, **kwargs)

    return init


def _queue_of_one_process(original: Callable) -> Callable:
    """``get_write_results_queue`` starts a process to hold a queue, which only asynchronous saves share with another.

    It would import this run's main module again, and torch for the first result: every rank waits for that in its first
    save, 5 s and more, and it stays in the host's memory.
    """
    results: queue.Queue = queue.Queue()

    @functools.wraps(original)
    def get_write_results_queue(*args: Any, **kwargs: Any) -> Any:
        from megatron.training import global_vars

        of_run = global_vars._GLOBAL_ARGS
        return original(*args, **kwargs) if getattr(of_run, "async_save", False) else results

    return get_write_results_queue


# Resuming with DistributedOptimizer over torch.optim.Adam: Apex and Transformer Engine keep one `step` in the parameter
# group, torch keeps one tensor per parameter, and three places of DistributedOptimizer overlook that.


def _cut_states_where_they_are(original: Callable) -> Callable:
    """``sharded_param_state_fully_reshardable`` finds each parameter's state in what all ranks' buckets hold together.

    It lays the buckets end to end without their padding, and then looks for parameters at their places in the padded
    buffer: behind the first padded bucket, a checkpoint gets weights and moments of other parameters. A bucket is
    padded to a multiple of 128 elements: one small parameter, or a table of the whole model, which has a bucket of its
    own, is enough.
    """

    @functools.wraps(original)
    def sharded(self: Any, *args: Any, **kwargs: Any) -> Any:
        padded = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                buffer.param_index_map = _places_without_padding(buffer)
            return original(self, *args, **kwargs)
        finally:
            for buffer, places in zip(self.buffers, padded, strict=True):
                buffer.param_index_map = places

    return sharded


def _places_without_padding(buffer: Any) -> dict[torch.nn.Parameter, tuple[int, int, int]]:
    """Start, end and bucket of each parameter, in the buffer's order, as if no bucket were padded."""
    padding, unpadded = [], 0
    for bucket in buffer.buckets:
        padding.append(bucket.offset - unpadded)
        unpadded += bucket.numel_unpadded
    return {
        param: (start - padding[bucket], end - padding[bucket], bucket)
        for param, (start, end, bucket) in buffer.param_index_map.items()
    }


def _state_dict_of_a_fresh_optimizer(original: Callable) -> Callable:
    """``state_dict`` reads `step` from states which do not exist before the first step, nor on a rank without a shard.

    It is called even so, to load a checkpoint or to save one at iteration 0. So the states are made here.
    """

    @functools.wraps(original)
    def state_dict(self: Any) -> dict[str, Any]:
        inner = self.optimizer
        if not isinstance(inner, ADAM) or inner.state:
            return original(self)
        for group in inner.param_groups:
            for param in group["params"]:
                zeros = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
                inner.state[param] = {"step": torch.tensor(0.0), **zeros}
        if inner.state:
            return original(self)
        states: dict[Any, Any] = inner.state
        states["none"] = {"step": torch.tensor(0.0)}
        try:
            return original(self)
        finally:
            del states["none"]

    return state_dict


def _load_state_dict_with_own_steps(original: Callable) -> Callable:
    """``load_state_dict`` gives all parameters one shared `step` tensor, to which torch then adds 1 per parameter."""

    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> None:
        original(self, state_dict)
        if isinstance(self.optimizer, ADAM):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    return load_state_dict


def _set_states_but_the_step(original: Callable) -> Callable:
    """``_set_main_param_and_optimizer_states`` copies every tensor of the state, `step` too.

    One checkpoint format does not hold it (KeyError), the other holds this rank's old one; ``load_state_dict`` has set
    it by then. One caller, besides, leaves autograd on, which refuses to copy into the main parameters.
    """

    @functools.wraps(original)
    @torch.no_grad()
    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        original(self, model_param, {**tensors, "step": None})  # it skips what is not a tensor

    return set_states


# Resuming with expert parallelism: a checkpoint holds the RNG states of one data-parallel rank, since the others have
# the same ones - all but the tracker of the experts, which exists to differ.


def _save_rng_of_experts(original: Callable) -> Callable:
    """``get_rng_state`` adds the experts' RNG state of every data-parallel rank."""

    @functools.wraps(original)
    def get_rng_state(*args: Any, **kwargs: Any) -> Any:
        saved = original(*args, **kwargs)
        states = getattr(saved, "data", saved)  # a ShardedObject, for torch_dist
        group, own = _experts_rng()
        if isinstance(states, list) and len(states) == 1 and own is not None and group.size() > 1:
            states[0][EXPERTS_RNG] = [None] * group.size()
            torch.distributed.all_gather_object(states[0][EXPERTS_RNG], own, group=group)
        return saved

    return get_rng_state


def _load_rng_of_experts(original: Callable) -> Callable:
    """``_load_base_checkpoint`` picks this rank's, or keeps the fresh one where the number of ranks has changed."""

    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        loaded = original(*args, **kwargs)
        states = (loaded[0] or {}).get("rng_state")
        if isinstance(states, list) and len(states) == 1 and EXPERTS_RNG in states[0]:
            by_rank = states[0].pop(EXPERTS_RNG)
            group, own = _experts_rng()
            state = by_rank[group.rank()] if len(by_rank) == group.size() else own
            states[0]["rng_tracker_states"][_experts_tracker()] = state
        return loaded

    return load


def _experts_rng() -> tuple[Any, torch.Tensor | None]:
    """The group of all ranks whose states a checkpoint takes for equal; this rank's RNG state for experts."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = get_cuda_rng_tracker().get_states().get(_experts_tracker())
    return group, state if isinstance(state, torch.Tensor) else None  # a Generator, under CUDA graphs


def _experts_tracker() -> str:
    from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name

    return get_expert_parallel_rng_tracker_name()


def _log_first_iteration_once(original: Callable) -> Callable:
    """``training_log`` logs the first iteration of a run, resumed or not, without closing its interval.

    With an interval of 1 the second line then shows the mean of two losses. Where the interval ends with the first
    iteration anyway, the iteration is an ordinary one.
    """

    @functools.wraps(original)
    def training_log(
        loss_dict: Any, total_loss_dict: Any, learning_rate: Any, iteration: int, *args: Any, **kwargs: Any
    ) -> Any:
        from megatron.training import get_args

        if iteration % get_args().log_interval == 0:
            kwargs["is_first_iteration"] = False
        return original(loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs)

    return training_log


def _end_the_schedule_with_the_run(original: Callable) -> Callable:
    """``load_checkpoint``: the schedule counts sequences, and takes all steps for as large as those to come.

    After steps with another global batch it would end before the last step, or never come down to the lowest rate.
    Steps that were skipped (fp16) are none of the schedule, and stay so.
    """

    @functools.wraps(original)
    def load_checkpoint(
        model: Any, optimizer: Any, opt_param_scheduler: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from megatron.training import get_args

        iteration, flops = original(model, optimizer, opt_param_scheduler, *args, **kwargs)
        scheduler, samples = opt_param_scheduler, get_args().consumed_train_samples
        if scheduler is not None and samples and scheduler.override_opt_param_scheduler:
            scheduler.lr_decay_steps += samples - iteration * get_args().global_batch_size
            scheduler.step(0)
        return iteration, flops

    return load_checkpoint


def _note_learning_rate(original: Callable) -> Callable:
    """``train_step`` moves the schedule on, and only then is the rate read for the log: that of the next step."""
    read = stock(importlib.import_module("megatron.training.training"), "get_canonical_lr_for_logging")

    @functools.wraps(original)
    def train_step(step: Any, data: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        rate = read(optimizer.param_groups)
        _used_rates[:] = [None if rate is None else float(rate)]
        return original(step, data, model, optimizer, *args, **kwargs)

    return train_step


def _learning_rate_of_step(original: Callable) -> Callable:
    return functools.wraps(original)(
        lambda param_groups: _used_rates[0] if _used_rates else original(param_groups)
    )


# Over one rank there is nothing to reduce: the stock functions move a number to the GPU and back, for which the host
# waits until the optimizer's step is done, and then does on an idle GPU what it could have done meanwhile.


def _and_over_one_rank(original: Callable) -> Callable:
    @functools.wraps(original)
    def reduced(input: bool, group: Any = None) -> bool:
        return input is True if _is_one_rank(group) else original(input, group)

    return reduced


def _largest_of_one_rank(original: Callable) -> Callable:
    """The same number, in float32, and None for -1."""

    @functools.wraps(original)
    def reduced(stat: float | None, group: Any = None) -> float | None:
        if not _is_one_rank(group):
            return original(stat, group)
        found = torch.tensor(-1.0 if stat is None else stat, dtype=torch.float32, device="cpu").item()
        return None if found == -1.0 else found

    return reduced


def _is_one_rank(group: Any) -> bool:
    from megatron.core import parallel_state

    return (parallel_state.get_model_parallel_group() if group is None else group).size() == 1


def defaults_without_te() -> dict[str, Any]:
    """Parser defaults (by argparse `dest`) for what this environment lacks; empty with Transformer Engine on CUDA."""
    from megatron.core.transformer.enums import AttnBackend

    found = {name: importlib.util.find_spec(name) is not None for name in OPTIONAL_MODULES}
    defaults: dict[str, Any] = {}
    if not found["transformer_engine"]:
        defaults |= {
            "transformer_impl": "local",
            "attention_backend": AttnBackend.unfused,  # `local` demands `--spec local`
            "apply_rope_fusion": False,
            "no_persist_layer_norm": True,
        }
    if not found["fused_weight_gradient_mlp_cuda"]:
        defaults["gradient_accumulation_fusion"] = False
    if not found["scaled_upper_triang_masked_softmax_cuda"]:
        defaults["masked_softmax_fusion"] = False
    if cpu.needed():
        defaults |= {
            "distributed_backend": "gloo",
            "num_workers": 0,  # nothing to overlap the reading with
            "bias_gelu_fusion": False,  # torch.compile
            "bias_swiglu_fusion": False,
            "bias_dropout_fusion": False,
        }
    return defaults

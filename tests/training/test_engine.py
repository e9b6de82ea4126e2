"""The assignments into Megatron: each does its work, and its reason still exists in the installed version."""

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from linear_moe.training import cpu, engine, optimizer_step
from tests.training.stock_gpt import MOE, pretrain_tiny
from tests.workers import with_model_parallel

ROOT = Path(__file__).parents[2]

# Resuming


def without_install(name: str) -> Callable:
    """The stock method of DistributedOptimizer."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    engine.install()
    return engine.stock(DistributedOptimizer, name)


def small_optimizer(sizes: tuple[int, ...], bucket_size: int | None = None) -> Any:
    """A distributed optimizer over parameters of these sizes, with a gradient of ones in each."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    module = MegatronModule(config)
    for index, size in enumerate(sizes):
        module.register_parameter(f"p{index}", torch.nn.Parameter(torch.arange(float(size))))
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=bucket_size is not None, bucket_size=bucket_size
    )
    model = DistributedDataParallel(config, ddp, module)
    for parameter in model.parameters():
        parameter.main_grad.fill_(1.0)
    options = OptimizerConfig(optimizer="adam", lr=0.1, use_distributed_optimizer=True, clip_grad=0.0)
    (optimizer,) = get_megatron_optimizer(options, [model]).chained_optimizers
    return optimizer


def params(optimizer: Any) -> list[torch.Tensor]:
    return list(optimizer.model_param_group_index_map)


def steps(optimizer: Any) -> list[float]:
    return [float(state["step"]) for state in optimizer.optimizer.state.values()]


def reasons_of_the_optimizer(rank: int, world_size: int) -> None:
    stock_state_dict = without_install("state_dict")
    stock_load = without_install("load_state_dict")
    stock_set = without_install("_set_main_param_and_optimizer_states")
    with with_model_parallel(gloo_groups=True):
        fresh = small_optimizer((64, 32))
        with pytest.raises(AssertionError):  # no states yet, hence no step
            stock_state_dict(fresh)
        trained = small_optimizer((64, 32))
        trained.step()
        saved = trained.state_dict()
        fresh.state_dict()
        stock_load(fresh, saved)
        states = list(fresh.optimizer.state.values())
        assert states[0]["step"] is states[1]["step"]  # one tensor, so that one step would count twice
        model_param = params(fresh)[0]
        main = fresh._get_main_param_and_optimizer_states(model_param)
        with pytest.raises(KeyError, match="step"), torch.no_grad():
            stock_set(fresh, model_param, {name: main[name] for name in ("param", "exp_avg", "exp_avg_sq")})
        with pytest.raises(RuntimeError, match="leaf"):
            stock_set(fresh, model_param, main)


def test_the_optimizer_still_needs_its_corrections(gloo) -> None:
    gloo(1, reasons_of_the_optimizer)


def a_small_resume(rank: int, world_size: int) -> None:
    engine.install()
    with with_model_parallel(gloo_groups=True):
        straight, resumed = small_optimizer((64, 32)), small_optimizer((64, 32))
        for _ in range(3):
            straight.step()
        saved = straight.state_dict()
        values = [straight._get_main_param_and_optimizer_states(param) for param in params(straight)]
        resumed.load_state_dict(resumed.state_dict())  # as when a checkpoint is about to be read
        assert steps(resumed) == [0.0] * len(steps(resumed))
        resumed.load_state_dict(saved)
        for param, tensors in zip(params(resumed), values):
            resumed._set_main_param_and_optimizer_states(param, tensors)
        assert steps(resumed) == [3.0] * len(steps(resumed)) != []
        for optimizer in (straight, resumed):
            optimizer.step()
        assert steps(resumed) == steps(straight) == [4.0] * len(steps(resumed))
        for one, other in zip(straight.optimizer.state.items(), resumed.optimizer.state.items()):
            assert torch.equal(one[0], other[0])
            assert all(
                torch.equal(one[1][name], other[1][name]) for name in ("exp_avg", "exp_avg_sq", "step")
            )


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loaded_optimizer_steps_as_the_saved_one(gloo, world_size: int) -> None:
    gloo(world_size, a_small_resume)


def states_of_padded_buckets(rank: int, world_size: int) -> None:
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    name = "sharded_param_state_fully_reshardable"
    stock = without_install(name)
    with with_model_parallel(gloo_groups=True):
        optimizer = small_optimizer((100, 30, 50), bucket_size=1)
        assert len(optimizer.buffers[0].buckets) == 3
        optimizer.step()
        every = list(optimizer.buffers[0].param_index_map)
        model = {f"p{i}": ShardedTensor.from_rank_offsets(f"p{i}", p) for i, p in enumerate(every)}

        def right(method: Callable) -> list[bool]:
            states = method(optimizer, model, False, {}).values()
            weights = [(state["param"], model[state["param"].key.rsplit(".")[-1]]) for state in states]
            return [torch.equal(saved.data, weight.data) for saved, weight in weights]

        assert sorted(right(stock)) == [False, False, True]  # behind padding, the states of others
        assert right(getattr(DistributedOptimizer, name)) == [True] * 3
        assert sorted(right(stock)) == [False, False, True], "the optimizer is as it was"


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_checkpoint_has_the_states_of_padded_buckets(gloo, world_size: int) -> None:
    gloo(world_size, states_of_padded_buckets)


def numbers_over_ranks(rank: int, world_size: int) -> list[Any]:
    """Reduced by the stock functions and by ours: how often ours ask other ranks."""
    import megatron.training.training as training
    import torch.distributed as dist
    from megatron.core import parallel_state

    engine.install()
    cases: dict[str, tuple[Any, ...]] = {
        "logical_and_across_model_parallel_group": (True, False),
        "reduce_max_stat_across_model_parallel_group": (None, 0.1, -1.0, 3e38, float("nan"), 7),
    }
    found = []
    with with_model_parallel(tp=world_size):
        for group in (None, parallel_state.get_model_parallel_group()):
            for name, value in ((name, value) for name, values in cases.items() for value in values):
                mine = value if rank == 0 or value is None else 0
                expected = engine.stock(training, name)(mine, group=group)
                with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce:
                    ours = getattr(training, name)(mine, group=group)
                assert repr(ours) == repr(expected), (name, value)  # NaN, and which type
                found.append(reduce.call_count)
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_numbers_of_one_rank_are_not_reduced(gloo: Any, world_size: int) -> None:
    """On a GPU the host would wait for the optimizer's kernels."""
    assert gloo(world_size, numbers_over_ranks) == [[world_size - 1] * 16] * world_size


def fused_adam(rank: int, world_size: int) -> None:
    """Continued from a checkpoint of the unfused one, whose choice must not come back with its states."""
    engine.install()
    with with_model_parallel(gloo_groups=True):
        plain, fused = (small_optimizer((3, 200)) for _ in range(2))
        plain.step()
        with mock.patch.object(optimizer_step, "_can_fuse", lambda param: True):
            fused.step()
            fused.load_state_dict(plain.state_dict())
            for ours, theirs in zip(params(fused), params(plain), strict=True):
                saved = plain._get_main_param_and_optimizer_states(theirs)
                fused._set_main_param_and_optimizer_states(ours, {n: x.clone() for n, x in saved.items()})
            fused.step()
            assert all(group["fused"] for group in fused.optimizer.param_groups)
        plain.step()
        assert not any(group["fused"] for group in plain.optimizer.param_groups if group["params"])
        assert steps(plain) == steps(fused) == [2.0] * len(steps(plain))
        for one, other in zip(plain.optimizer.state.items(), fused.optimizer.state.items(), strict=True):
            torch.testing.assert_close(one[0], other[0], rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(one[1], other[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("world_size", [1, 2])
def test_adam_is_one_kernel(gloo, world_size: int) -> None:
    gloo(world_size, fused_adam)


def no_shard_on_one_rank(rank: int, world_size: int) -> int:
    engine.install()
    with with_model_parallel(gloo_groups=True):
        optimizer = small_optimizer((8,))
        shards = sum(len(group["params"]) for group in optimizer.optimizer.param_groups)
        for _ in range(2):
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()
        assert len(optimizer.optimizer.state) == shards
        return shards


def test_a_rank_without_parameters_saves_and_loads(gloo) -> None:
    assert sorted(gloo(2, no_shard_on_one_rank)) == [0, 1]


def saved_before_the_first_step(rank: int, world_size: int) -> None:
    from megatron.core.dist_checkpointing import ShardedTensor

    engine.install()
    with with_model_parallel(gloo_groups=True):
        optimizer, values = small_optimizer((64, 32)), [torch.arange(64.0), torch.arange(32.0)]
        every = list(optimizer.buffers[0].param_index_map)
        model = {f"p{i}": ShardedTensor.from_rank_offsets(f"p{i}", p) for i, p in enumerate(every)}
        saved = optimizer.sharded_state_dict(
            model, metadata={"distrib_optim_sharding_type": "fully_reshardable"}
        )
        assert [group["step"] for group in saved["optimizer"]["param_groups"]] == [0.0]
        states = sorted(saved["param_state"].values(), key=lambda state: -len(state["param"].data))
        for state, value in zip(states, values, strict=True):
            assert torch.equal(state["param"].data, value)
            assert not state["exp_avg"].data.any() and not state["exp_avg_sq"].data.any()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_that_has_skipped_its_steps_saves_them(gloo, world_size: int) -> None:
    """In float16, while the loss scale comes down: Adam has no states yet, and a checkpoint needs them."""
    gloo(world_size, saved_before_the_first_step)


RESUMES = {
    "one process": (1, MOE),
    "TP2": (2, "--tensor-model-parallel-size 2"),
    "PP2": (2, f"--pipeline-model-parallel-size 2 {MOE}"),
    "EP2 bf16": (2, f"--expert-model-parallel-size 2 --bf16 {MOE}"),
    "DP2 dist-opt": (2, f"--use-distributed-optimizer {MOE}"),
    "EP2 dist-opt, reshardable, bf16": (
        2,
        "--expert-model-parallel-size 2 --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable --bf16 "
        + MOE,
    ),
}


@pytest.mark.parametrize("name", RESUMES)
def test_a_resumed_run_is_bit_identical(gloo, tmp_path: Path, name: str) -> None:
    """Weights, Adam, every RNG (dropout is on) and losses, after 2 + 2 iterations and after 4."""
    world_size, flags = RESUMES[name]
    flags += f" --save {tmp_path} --load {tmp_path}"
    straight = gloo(world_size, pretrain_tiny, flags.split(" --save")[0], 4)
    gloo(world_size, pretrain_tiny, flags, 2)
    resumed = gloo(world_size, pretrain_tiny, flags, 4)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "4"
    for one, other in zip(straight, resumed):
        assert other["losses"] == one["losses"][2:]
        assert other["python"] == one["python"] and (other["numpy"] == one["numpy"]).all()
        for kind in ("parameters", "rng"):
            assert one[kind].keys() == other[kind].keys()
            for key, value in one[kind].items():
                assert torch.equal(other[kind][key], value), (kind, key)
        assert len(one["adam"]) == len(other["adam"]) > 0
        for state, resumed_state in zip(one["adam"], other["adam"]):
            assert float(state["step"]) == 4.0
            assert all(torch.equal(resumed_state[key], value) for key, value in state.items())


# Logging, FLOPs


def first_losses(rank: int, world_size: int, stock: bool) -> list[float]:
    """What is left in the running sums after each log line of a run with an interval of 1."""
    import megatron.training.training as training

    left: list[float] = []

    def watching(original: Callable) -> Callable:
        original = engine.stock(training, "training_log") if stock else original

        def training_log(loss_dict: dict, total_loss_dict: dict, *args: Any, **kwargs: Any) -> Any:
            flag = original(loss_dict, total_loss_dict, *args, **kwargs)
            left.append(float(total_loss_dict["lm loss"]))
            return flag

        return training_log

    stock_install = engine.install
    engine.install = lambda **kwargs: stock_install(training_log=watching)  # type: ignore[assignment]
    try:
        pretrain_tiny(rank, world_size, "", 2)
    finally:
        engine.install = stock_install
    return left


def test_each_line_logs_its_own_loss(gloo) -> None:
    assert gloo(1, first_losses, False) == [[0.0, 0.0]]
    ((first, _),) = gloo(1, first_losses, True)
    assert first > 0.0, "Megatron logs the first loss once by itself now: drop _log_first_iteration_once"


def installs(rank: int, world_size: int) -> None:
    import megatron.training.training as training

    def flops(*args: Any, **kwargs: Any) -> float:
        return 7.0

    originals = []

    def wrap(original: Callable) -> Callable:
        originals.append(original)
        return lambda *args: original

    engine.install()
    stock = engine.stock(
        training, "num_floating_point_operations"
    )  # earlier runs in this worker may have replaced it
    assert stock.__name__ == "num_floating_point_operations"
    engine.install(flops=flops, training_log=wrap)
    engine.install(flops=flops, training_log=wrap)
    assert training.num_floating_point_operations is flops
    assert [original.__wrapped__ for original in originals] == [engine.stock(training, "training_log")] * 2
    engine.install(flops=stock)


def test_install_twice_wraps_once(gloo) -> None:
    gloo(1, installs)


# Starting


def no_makefile(rank: int, world_size: int) -> None:
    import megatron.core.datasets.utils as datasets

    assert not (Path(datasets.__file__).parent / "Makefile").exists(), "the wheel can compile: drop the no-op"
    engine.install()
    datasets.compile_helpers()
    name = "megatron.core.datasets.helpers_cpp"
    module = sys.modules.pop(name)
    sys.modules[name] = None  # type: ignore[assignment]  what an import that fails leaves
    try:
        with pytest.raises(ValueError, match="force-reinstall"):
            datasets.compile_helpers()
    finally:
        sys.modules[name] = module


def test_the_wheel_without_a_makefile_starts(gloo) -> None:
    gloo(1, no_makefile)


def queues_of_saves(rank: int, world_size: int) -> list[Any]:
    import multiprocessing

    import megatron.core.dist_checkpointing.strategies.filesystem_async as writers
    from megatron.training import global_vars

    engine.install()
    found, before = [], {child.pid for child in multiprocessing.active_children()}
    stock = mock.Mock(return_value="of several processes")
    ours = engine._queue_of_one_process(stock)
    for args in (None, argparse.Namespace(async_save=False), argparse.Namespace(async_save=True)):
        with mock.patch.object(global_vars, "_GLOBAL_ARGS", args):
            found.append(ours())
    assert writers.get_write_results_queue() is writers.get_write_results_queue() is not found[0]
    new = [child for child in multiprocessing.active_children() if child.pid not in before]
    return [type(found[0]).__name__, found[0] is found[1], found[2], len(new)]


def test_a_save_starts_no_process(gloo) -> None:
    """But an asynchronous one, which another process writes."""
    assert gloo(1, queues_of_saves)[0] == ["Queue", True, "of several processes", 0]


def stream_of_gradients(rank: int, world_size: int, graphs: str, on_cpu: bool) -> str:
    """The stream on which a DDP wrapper is made, where Megatron makes it on one of its own."""
    from megatron.core.distributed import DistributedDataParallel

    current = ["the wrapper's"]

    class On:
        def __init__(self, stream: str) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            current.append(self.stream)

        def __exit__(self, *error: object) -> None:
            current.pop()

    def init(self: Any, config: Any, ddp_config: Any, module: Any, *, pg_collection: Any) -> None:
        found.append((current[-1], ddp_config, module, pg_collection))

    found: list[Any] = []
    engine.install()
    assert engine.stock(DistributedDataParallel, "__init__") is not DistributedDataParallel.__init__
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "default_stream", lambda: "the backward pass's"),
        mock.patch.object(torch.cuda, "stream", On),
        mock.patch.object(cpu, "is_active", lambda: on_cpu),
    ):
        config = argparse.Namespace(cuda_graph_impl=graphs)
        engine._sum_gradients_where_they_are_made(init)(None, config, 1, 2, pg_collection=3)
    assert found[0][1:] == (1, 2, 3) and len(current) == 1
    return found[0][0]


def test_gradients_are_summed_on_the_stream_that_makes_them(gloo) -> None:
    assert gloo(1, stream_of_gradients, "none", False) == ["the backward pass's"]
    assert gloo(1, stream_of_gradients, "full_iteration", False) == ["the wrapper's"]
    assert gloo(1, stream_of_gradients, "none", True) == ["the wrapper's"]


@pytest.mark.gpu
def test_memory_of_a_gradient_is_free_when_it_is_summed() -> None:
    """And not after an event of another stream, while the host goes on."""
    code = """
import torch
from linear_moe.inference.load import join_single_process
from linear_moe.training import engine
engine.install()
join_single_process(0)
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer import TransformerConfig

def pending(init):
    DistributedDataParallel.__init__ = init
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    module = torch.nn.Linear(2048, 2048, bias=False, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        model = DistributedDataParallel(config, DistributedDataParallelConfig(), module)
    torch.cuda.synchronize()
    for _ in range(2):
        loss = model(torch.ones(8, 2048, device="cuda")).sum()
        torch.cuda._sleep(200_000_000)
        loss.backward()
    stats = torch.cuda.memory_stats()
    torch.cuda.synchronize()
    return stats["active_bytes.all.current"] - stats["allocated_bytes.all.current"]

ours, stock = DistributedDataParallel.__init__, engine.stock(DistributedDataParallel, "__init__")
found = [pending(stock), pending(ours)]
print(found)
assert found[0] >= 2**24 and found[1] == 0, found
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT, timeout=120)


def other_version(rank: int, world_size: int) -> None:
    from megatron.core import package_info

    package_info.MINOR += 1
    try:
        with pytest.raises(ValueError, match=r"megatron-core\[training\]==0.19.2"):
            engine.install()
    finally:
        package_info.MINOR -= 1


def test_another_version_is_refused(gloo) -> None:
    gloo(1, other_version)


# Flags


def dests(rank: int, world_size: int) -> dict[str, Any]:
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    known = {action.dest for action in parser._actions}
    defaults = engine.defaults_without_te()
    assert defaults.keys() <= known, defaults.keys() - known
    return {name: str(value) for name, value in defaults.items()}


def test_defaults_without_te_name_real_flags(gloo) -> None:
    (defaults,) = gloo(1, dests)
    assert defaults["transformer_impl"] == "local" and defaults["distributed_backend"] == "gloo"


def test_defaults_follow_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    enums = ModuleType("megatron.core.transformer.enums")
    enums.AttnBackend = argparse.Namespace(unfused="unfused")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, enums.__name__, enums)
    monkeypatch.setattr(cpu, "needed", lambda: False)
    on_cuda = engine.defaults_without_te()
    assert on_cuda["transformer_impl"] == "local" and "distributed_backend" not in on_cuda
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert engine.defaults_without_te() == {}
    apex = {"fused_weight_gradient_mlp_cuda": "gradient_accumulation_fusion"}
    apex["scaled_upper_triang_masked_softmax_cuda"] = "masked_softmax_fusion"
    for module, flag in apex.items():  # each has the kernel that one flag asks for
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, module=module: name != module or None)
        assert engine.defaults_without_te() == {flag: False}

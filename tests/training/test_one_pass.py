"""The optimizer's step in one pass: what Megatron's own does, through each of its optimizers over Adam.

The kernel is the real one in Triton's interpreter, where that can run; tests/kernels/test_adam.py is about it alone.
Training takes it here, too: models of tests have no parameter that is large enough without help.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from linear_moe.kernels import adam, dispatch
from linear_moe.kernels.triton import trial
from linear_moe.training import engine, one_pass, optimizer_step
from tests.training.tiny import ARGUMENTS, DISTRIBUTED_OPTIMIZER, EXPERTS, train
from tests.workers import with_model_parallel

SIZES = (3, 200, 64, 1000)
LARGE = 64
"""From which size the kernel takes a parameter here: cut over two ranks, a shard may be smaller."""


def interpreted() -> Any:
    """The module of the fused kernel, for this process's CPU."""
    from linear_moe.kernels import triton

    spec = importlib.util.spec_from_file_location("interpreted_adam", Path(triton.__path__[0], "adam.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict("os.environ", TRITON_INTERPRET="1"):
        spec.loader.exec_module(module)
    return module


@contextmanager
def kernel(spoil: float = 1.0) -> Iterator[list[int]]:
    """There is one for CPUs, interpreted but for bfloat16, which the interpreter cannot; the sizes of what it steps.

    With ``spoil`` it multiplies gradients by that.
    """
    sizes: list[int] = []
    fused_adam = interpreted()

    def run(
        param: Tensor, grad: Tensor, m: Tensor, v: Tensor, half: Tensor | None = None, **options: Any
    ) -> None:
        sizes.append(param.numel())
        module = adam if half is not None and half.dtype == torch.bfloat16 else fused_adam
        module.adam_(param, grad * spoil, m, v, half, **options)

    fused, in_torch, definition = dispatch.BACKENDS["adam_"]
    fused = dataclasses.replace(fused, run=run, obstacle=in_torch.obstacle)
    with (
        mock.patch.dict(dispatch.BACKENDS, adam_=(fused, in_torch, definition)),
        mock.patch.dict("os.environ"),
        mock.patch.object(trial, "_passed", {}),
        mock.patch.object(one_pass, "LARGE", LARGE),
        mock.patch.object(optimizer_step, "_can_fuse", lambda param: True),  # torch's kernel takes the rest
    ):
        os.environ.pop(dispatch.ENVIRONMENT_VARIABLE, None)
        yield sizes


class Run:
    """A small model under one of Megatron's optimizers."""

    def __init__(self, dtype: torch.dtype, distributed: bool, overlap: bool = False, **options: Any) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.module import MegatronModule

        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        module = MegatronModule(config)
        for index, size in enumerate(SIZES):
            param = torch.nn.Parameter((torch.arange(float(size)) % 7 - 3).to(dtype))
            if index == 1:
                param = torch.nn.Parameter(param.detach().float())  # a gate: float32 in any model
            if index == 3:
                param = torch.nn.Parameter(param.detach().view(25, 40))
            if index == 2:
                param.allreduce = False  # an expert, which has an optimizer of its own
            module.register_parameter(f"p{index}", param)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=distributed, overlap_param_gather=overlap,
            overlap_grad_reduce=overlap,
        )  # fmt: skip
        self.model = DistributedDataParallel(config, ddp, module)
        usual: dict[str, Any] = dict(lr=0.1, clip_grad=1.0, weight_decay=0.1, grad_norm_skip_threshold=50.0)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", use_distributed_optimizer=distributed, bf16=dtype == torch.bfloat16,
                fp16=dtype == torch.float16, initial_loss_scale=8.0, hysteresis=1, **usual | options,
            ),
            [self.model],
        )  # fmt: skip

    def step(self, number: int, factor: float = 1.0) -> Any:
        generator = torch.Generator().manual_seed(number)
        for param in self.model.parameters():
            param.main_grad.copy_(torch.randn(param.shape, generator=generator) * factor)
        return self.optimizer.step()

    def everything(self) -> list[torch.Tensor]:
        """Weights of the model, and of the optimizers with their states."""
        states = [
            x
            for one in self.inner()
            for group in one.param_groups
            for param in group["params"]
            for x in (param, *(one.state[param][name] for name in ("exp_avg", "exp_avg_sq", "step")))
        ]
        return [*(param.detach() for param in self.model.parameters()), *states]

    def load(self, other: Run) -> None:
        """Weights and optimizers of another run, as from a checkpoint: ``state_dict`` has no states of parameters."""
        for mine, its in zip(self.model.parameters(), other.model.parameters(), strict=True):
            mine.data.copy_(its)
        for mine, its in zip(
            self.optimizer.chained_optimizers, other.optimizer.chained_optimizers, strict=True
        ):
            mine.load_state_dict(copy.deepcopy(its.state_dict()))
            params = zip(mine.model_param_group_index_map, its.model_param_group_index_map, strict=True)
            for my_param, its_param in params:
                state = its._get_main_param_and_optimizer_states(its_param)
                mine._set_main_param_and_optimizer_states(my_param, {n: x.clone() for n, x in state.items()})

    def inner(self) -> list[Any]:
        return [one.optimizer for one in self.optimizer.chained_optimizers]


def stock_run(**case: Any) -> Run:
    """Under Megatron's own step."""
    with mock.patch.object(one_pass, "install"):
        return Run(**case)


def assert_same(ours: Run, stock: Run) -> None:
    for one, other in zip(ours.everything(), stock.everything(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)
    params = [param for one in ours.inner() for group in one.param_groups for param in group["params"]]
    assert all(param.grad is not None for param in params)


KINDS: dict[str, dict[str, Any]] = {
    "bf16, shards": dict(dtype=torch.bfloat16, distributed=True),
    "bf16, shards, overlapped gathers": dict(dtype=torch.bfloat16, distributed=True, overlap=True),
    "bf16": dict(dtype=torch.bfloat16, distributed=False),
    "fp16, shards": dict(dtype=torch.float16, distributed=True),
    "fp16": dict(dtype=torch.float16, distributed=False),
    "fp32, shards": dict(dtype=torch.float32, distributed=True),
    "fp32": dict(dtype=torch.float32, distributed=False),
    "Adam with a penalty": dict(dtype=torch.bfloat16, distributed=True, decoupled_weight_decay=False),
}


def same_as_stock(rank: int, world_size: int, name: str) -> None:
    """A usual step, one that is skipped, one that is not clipped, and another usual one."""
    engine.install()
    case = KINDS[name]
    scales = 1.0, (float("inf") if case["dtype"] == torch.float16 else 2.0), 0.001, 1.0
    with with_model_parallel(gloo_groups=True), kernel() as sizes:
        ours, stock = Run(**case), stock_run(**case)
        for number, factor in enumerate(scales):
            sizes.clear()
            found = ours.step(number, factor)
            assert found == stock.step(number, factor) and found[0] == (number != 1)
            assert set(sizes) == ({64, 200, 1000} if found[0] else set()) or world_size > 1
            assert_same(ours, stock)
            assert all(size >= LARGE for size in sizes)
            factors = {getattr(param, one_pass.FACTOR) for param in ours.optimizer.get_parameters()}
            assert (factors == {1.0}) == found[0] or factor == float("inf"), (
                "a factor waits for one step alone"
            )
        assert len(ours.optimizer.chained_optimizers) == 2


@pytest.mark.parametrize("name", KINDS)
def test_one_pass_is_what_megatron_does(gloo: Any, name: str) -> None:
    gloo(1, same_as_stock, name)


def test_shards_in_one_pass(gloo: Any) -> None:
    """Of two ranks: cut where they may be, some of them too small for the kernel."""
    gloo(2, same_as_stock, "bf16, shards")


def a_wrong_kernel(rank: int, world_size: int) -> None:
    engine.install()
    case = KINDS["fp16, shards"]
    with with_model_parallel(gloo_groups=True), kernel(spoil=1.3) as sizes:
        ours, stock = Run(**case), stock_run(**case)
        with pytest.warns(
            UserWarning, match="kernel of adam_ is not used.* It runs on torch's own step"
        ) as caught:
            assert ours.step(0) == stock.step(0)
        assert len(caught) == 2 == len(sizes), "with a copy and without"
        assert ours.step(1) == stock.step(1) and len(sizes) == 2
        assert_same(ours, stock)


def test_a_wrong_kernel_leaves_the_step_to_torch(gloo: Any) -> None:
    gloo(1, a_wrong_kernel)


def resumed(rank: int, world_size: int) -> None:
    """From a checkpoint of its own and from one of Megatron's step, whose steps are counted elsewhere."""
    engine.install()
    case = KINDS["bf16, shards"]
    with with_model_parallel(gloo_groups=True), kernel():
        straight, other, stock = Run(**case), Run(**case), stock_run(**case)
        for run in (straight, stock):
            run.step(0), run.step(1)
        other.load(straight)
        straight.step(2), other.step(2)
        for one, two in zip(straight.everything(), other.everything(), strict=True):
            assert torch.equal(one, two)
        other.load(stock)
        stock.step(2), other.step(2)
        assert_same(other, stock)
        stock.load(other)
        stock.step(3), other.step(3)
        assert_same(other, stock)


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumes_bit_exactly_and_from_megatron(gloo: Any, world_size: int) -> None:
    gloo(world_size, resumed)


def who_has_it(rank: int, world_size: int) -> None:
    engine.install()
    case = KINDS["bf16, shards"]
    has_it = lambda run: [hasattr(p, one_pass.FACTOR) for p in run.optimizer.get_parameters()]  # noqa: E731
    with with_model_parallel(gloo_groups=True):
        assert not any(has_it(Run(**case))), "a CPU"
        with kernel():
            assert all(has_it(Run(**case))) and not any(has_it(Run(**case, log_num_zeros_in_grad=True)))
            run = Run(**case)
            for group in run.optimizer.param_groups:
                group["amsgrad"] = len(group["params"]) and group["params"][0].numel() == 64
            stock = stock_run(**case)
            run.step(0), stock.step(0)
            states = [item for one in run.inner() for item in one.state.items()]
            sizes = [param.numel() for param, state in states if "max_exp_avg_sq" in state]
            assert sizes == [64], "torch's own step, on a gradient that is clipped"
            torch.testing.assert_close(run.everything()[2], stock.everything()[2])


def test_who_steps_in_one_pass(gloo: Any) -> None:
    gloo(1, who_has_it)


def exchanged(rank: int, world_size: int) -> None:
    """Storage of what a step reads and writes, between two steps and after one that was prepared and skipped."""
    engine.install()
    case = KINDS["bf16, shards"]

    def exchange(run: Run) -> None:
        for group in (*run.model.bucket_groups, *run.model.expert_parallel_bucket_groups):
            group.cached_param_buffer_shard_list = [None] * len(group.buckets)
        for one in run.optimizer.chained_optimizers:
            for buffer in one.buffers:
                for bucket in buffer.buckets if buffer.param_dtype == torch.bfloat16 else ():
                    bucket.param_data = bucket.param_data.clone()
                    for param in bucket.params:
                        start, end = (place - bucket.offset for place in buffer.param_index_map[param][:2])
                        param.data = bucket.param_data[start:end].view(param.shape)
            for main in itertools.chain.from_iterable(one.shard_fp32_from_float16_groups):
                main.data = main.data.clone()
            states = one.optimizer.state
            for main, state in states.items():
                states[main] = {name: x.clone() for name, x in state.items()}

    with with_model_parallel(gloo_groups=True), kernel():
        ours, straight = Run(**case), Run(**case)
        for number, factor in enumerate((1.0, 1.0, 2.0, 1.0)):
            assert ours.step(number, factor)[0] == straight.step(number, factor)[0] == (factor == 1.0)
            for one, other in zip(ours.everything(), straight.everything(), strict=True):
                assert torch.equal(one, other), number
            exchange(ours)


def test_nothing_is_kept_from_an_earlier_step(gloo: Any) -> None:
    gloo(1, exchanged)


def order(rank: int, world_size: int) -> None:
    """Of a step that has states: when its parts are prepared, when the norm is read, and what is launched then."""
    engine.install()
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    with with_model_parallel(gloo_groups=True), kernel() as sizes, pytest.MonkeyPatch.context() as patch:
        run = Run(**KINDS["bf16, shards"])
        run.step(0)
        events: list[Any] = []
        kinds = [
            (one_pass, "_prepare_large"), (ChainedOptimizer, "get_grad_norm"), (one_pass._Large, "launch"),
            (torch.optim.AdamW, "step"),
        ]  # fmt: skip
        for owner, name in kinds:
            stock = getattr(owner, name)
            patch.setattr(
                owner, name, lambda *args, stock=stock, name=name: events.append(name) or stock(*args)
            )
        sizes.clear()
        run.step(1)
        expected = ["_prepare_large"] * 4 + ["get_grad_norm"] + ["launch"] * 3 + ["step"] * 2
        assert events == expected and sizes == [1000, 200, 64], "those of both optimizers, the largest first"


def test_the_host_prepares_and_launches_the_large_first(gloo: Any) -> None:
    gloo(1, order)


# A run's steps

RUN_LARGE = 1000
RUN_STEPS = 3
RUN = [
    *ARGUMENTS, *EXPERTS, "--layer-kinds", "gla,softmax", "--num-layers", "2", "--train-iters", str(RUN_STEPS),
    "--weight-decay", "0.1", "--clip-grad", "0.1",
]  # fmt: skip
PRECISIONS: dict[str, list[str]] = {
    "float32": [],
    "float32, shards": DISTRIBUTED_OPTIMIZER,
    "bf16": ["--bf16"],
    "bf16, shards": ["--bf16", *DISTRIBUTED_OPTIMIZER],
}


@contextmanager
def beside_torch() -> Iterator[list[tuple[int, bool, bool]]]:
    """Every step of a large parameter is compared with torch's on copies: its elements, if clipped, if copied."""
    found: list[tuple[int, bool, bool]] = []
    groups: dict[int, dict[str, Any]] = {}
    prepare, launch = one_pass._prepare_large, one_pass._Large.launch

    def noted(inner: Any, group: Any, param: Tensor, *args: Any) -> Any:
        groups[id(param)] = group
        large = prepare(inner, group, param, *args)
        assert large is not None or param.numel() < RUN_LARGE, "the kernel did not take it"
        return large

    def both(self: Any) -> None:
        param, half, factor = self.param, self.half, getattr(self.param, one_pass.FACTOR)
        group = groups[id(param)]
        theirs = torch.nn.Parameter(param.detach().clone())
        assert param.grad is not None
        theirs.grad = param.grad * factor
        options = ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay")
        adam = torch.optim.Adam([theirs], fused=theirs.is_cuda, **{name: group[name] for name in options})
        adam.state[theirs] = {name: x.clone() for name, x in self.state.items()}
        adam.state[theirs]["step"] = adam.state[theirs]["step"].to(theirs.device)
        launch(self)
        adam.step()
        state, its = self.state, adam.state[theirs]
        assert float(state["step"]) == float(its["step"])
        for mine, torchs in [(param, theirs), *((state[n], its[n]) for n in ("exp_avg", "exp_avg_sq"))]:
            atol = 2e-7 * torchs.abs().max().item()  # of sums that cancel
            # torch's kernel takes 1 - beta2 of a beta2 in float32, which is off by 1.3e-5
            rtol = 2e-5 if theirs.is_cuda else 2e-6
            torch.testing.assert_close(mine.detach(), torchs.detach(), rtol=rtol, atol=atol)
        if half is not None:
            assert torch.equal(half, param.to(half.dtype)), "the model's copy"
        found.append((param.numel(), factor < 1.0, half is not None))

    with (
        mock.patch.object(one_pass, "_prepare_large", noted),
        mock.patch.object(one_pass._Large, "launch", both),
        mock.patch.object(one_pass, "LARGE", RUN_LARGE),
    ):
        yield found


def a_run(rank: int, world_size: int, precision: str, folder: str) -> None:
    """All large parameters, in all steps, some of which are clipped."""
    from linear_moe.training import cpu

    with ExitStack() as stack:
        if cpu.needed():
            stack.enter_context(kernel())
        found = stack.enter_context(beside_torch())
        train(rank, world_size, [*RUN, *PRECISIONS[precision], "--run-dir", folder])
    sizes, count = [size for size, _, _ in found], len(found) // RUN_STEPS
    assert sizes == sizes[:count] * RUN_STEPS and min(sizes) >= RUN_LARGE
    experts_and_tables = {4 * 64 * 64, 128 * 64}
    assert experts_and_tables <= set(sizes)
    copied = {size for size, _, is_copied in found if is_copied}
    assert experts_and_tables <= copied if "bf16" in precision else not copied
    assert any(is_clipped for _, is_clipped, _ in found)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_takes_the_kernel(gloo: Any, tmp_path: Path, precision: str) -> None:
    gloo(1, a_run, precision, str(tmp_path))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_on_a_gpu_takes_the_kernel(tmp_path: Path, precision: str) -> None:
    """The compiled kernel, in a process of its own, with all of the trainer around it."""
    call = f"from tests.training.test_one_pass import a_run; a_run(0, 1, {precision!r}, {str(tmp_path)!r})"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "--no-python"]
    run = subprocess.run(
        [sys.executable, *command, sys.executable, "-c", call],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]

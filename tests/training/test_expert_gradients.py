"""``--expert-gradients-in-place``: weight gradients of experts go into Megatron's sums, and a run stays what it was.

By default they do where a fused kernel is, which a CPU has not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from linear_moe.kernels import dispatch, grouped_linear
from linear_moe.model import experts, gradient_sums
from linear_moe.training import engine
from tests.training.parity import EP2, OVERLAP, PP2, RECOMPUTE_LAYERS, VPP2
from tests.training.tiny import (
    ARGUMENTS,
    DISTRIBUTED_OPTIMIZER,
    EXPERTS,
    losses,
    stale_sums_are_nan,
    train,
)
from tests.workers import with_model_parallel

FLAG, NOT = "--expert-gradients-in-place", "--no-expert-gradients-in-place"
Change = Callable[[bool], bool]
AS_IT_IS: Change = lambda add: add  # noqa: E731


@contextmanager
def on_the_cpu(change: str = "") -> Iterator[list[bool]]:
    """Grouped products wherever there are experts; whether each gradient was added, as changed if it is to be wrong, or
    as a fused kernel of the CPU's does.
    """
    if change == "fused":
        op = "grouped_weight_grad_"
        _, in_torch, definition = dispatch.BACKENDS[op]
        table = (dataclasses.replace(in_torch, name="triton"), in_torch, definition)
        with mock.patch.dict(dispatch.BACKENDS, {op: table}), on_the_cpu() as added:
            yield added
        return
    changes: dict[str, Change] = {"": AS_IT_IS, "always": lambda add: True, "never": lambda add: False}
    added: list[bool] = []
    write = grouped_linear.grouped_weight_grad_

    def record(*tensors: torch.Tensor, add: bool) -> None:
        added.append(add)
        write(*tensors, add=changes[change](add))

    with (
        mock.patch.object(experts, "can_group", lambda *tensors: True),
        mock.patch.object(grouped_linear, "grouped_weight_grad_", record),
    ):
        yield added


# ---- runs ----


def trained(rank: int, world_size: int, argv: list[str], change: str) -> tuple[list[bool], Any]:
    with on_the_cpu(change) as added:
        seen = train(rank, world_size, argv, observe=True)
    return added, seen["after"]


RUNS: dict[str, tuple[int, int, list[str]]] = {
    "one micro-batch": (1, 1, []),
    "two micro-batches": (1, 2, []),
    "inputs made again": (1, 2, ["--recompute-expert-inputs"]),
    "layers recomputed": (1, 2, RECOMPUTE_LAYERS),
    "DP2, shards": (2, 2, DISTRIBUTED_OPTIMIZER),
    "DP2, overlapped": (2, 2, OVERLAP),
    "DP2, replicas": (2, 2, []),
    "EP2, shards": (2, 2, [*EP2, *DISTRIBUTED_OPTIMIZER]),
    "PP2 VPP2": (2, 4, [*PP2, *VPP2]),
}
"""Processes, micro-batches of each, and flags."""
NUM_LAYERS, STEPS = 4, 4


def arguments(name: str, run: Path, *more: str) -> list[str]:
    world_size, micro_batches, flags = RUNS[name]
    replicas = 1 if "PP2" in name else world_size
    return [
        *(*ARGUMENTS, *EXPERTS, "--layer-kinds", "gla,softmax,gla,softmax", "--run-dir", str(run)),
        *("--lr", "1e-2", "--train-iters", str(STEPS), "--global-batch-size", str(micro_batches * replicas)),
        *(*flags, *more),
    ]


def both(gloo: Any, folder: Path, name: str, *more: str, change: str = "") -> list[tuple[list[Any], Any]]:
    """The ranks' outcomes, and the losses, without the flag and with it."""
    found = []
    for number, own in enumerate(([], [FLAG])):
        run = folder / str(number)
        outcomes = gloo(RUNS[name][0], trained, arguments(name, run, *more, *own), change)
        found.append((outcomes, losses(run)))
    return found


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same(gloo: Any, tmp_path: Path, name: str) -> None:
    """In float32 bit for bit; sums that are left of the last step are NaN."""
    (stock, expected), (found, in_place) = both(gloo, tmp_path, name)
    assert expected == in_place and len(expected) == STEPS
    layers = NUM_LAYERS // (2 if "PP2" in name else 1)
    for (none, before), (added, after) in zip(stock, found, strict=True):
        assert not none
        assert len(added) == 2 * layers * RUNS[name][1] * STEPS
        assert added.count(False) == 2 * layers * STEPS, "the first gradient of each step"
        for one, other in zip(before, after, strict=True):
            assert one[0] == other[0] and torch.equal(one[-1], other[-1]), one[0]


def test_a_run_in_bfloat16_is_almost_the_same(gloo: Any, tmp_path: Path) -> None:
    """Gradients are not rounded before they are added up."""
    (_, expected), (found, in_place) = both(gloo, tmp_path, "two micro-batches", "--bf16")
    assert found[0][0] and expected[0] == in_place[0]
    assert in_place == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("own", [[], [NOT]])
def test_the_default_is_where_a_fused_kernel_is(gloo: Any, tmp_path: Path, own: list[str]) -> None:
    ((added, _),) = gloo(1, trained, arguments("two micro-batches", tmp_path, *own), "fused")
    assert len(added) == (0 if own else 2 * NUM_LAYERS * 2 * STEPS)


@pytest.mark.parametrize("change", ["always", "never"])
def test_a_wrong_rule_is_seen(gloo: Any, tmp_path: Path, change: str) -> None:
    """Adding to what is left of the last step is NaN, and writing over the first micro-batch loses it."""
    try:
        (_, expected), (_, in_place) = both(gloo, tmp_path, "two micro-batches", change=change)
    except Exception as error:
        assert change == "always" and "nan" in str(error).lower(), error
    else:
        assert expected != in_place


# ---- one parameter ----

COUNTS = [[3, 0, 2], [0, 0, 0], [1, 4, 0]]
"""Of the tokens of a micro-batch's experts."""


def weight_model(overlap: bool, **attributes: Any) -> tuple[Any, torch.nn.Parameter, Any]:
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import MegatronModule

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    config.finalize_model_grads_func = finalize_model_grads
    config.expert_gradients_in_place = True
    module = MegatronModule(config)
    weight = torch.nn.Parameter((torch.arange(3 * 8 * 16) % 5 - 2.0).view(3, 8, 16))
    for name, value in {"allreduce": False, **attributes}.items():
        setattr(weight, name, value)
    module.register_parameter("weight", weight)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=overlap
    )
    return DistributedDataParallel(config, ddp, module), weight, config


def step(ddp: Any, weight: Any, config: Any, in_place: bool, number: int) -> torch.Tensor:
    """The sum after a step whose micro-batches use the weight twice, once, and once in a recomputed part."""
    from megatron.core.distributed import finalize_model_grads

    draw = torch.Generator().manual_seed(10 * number + torch.distributed.get_rank())
    integers = lambda *shape: torch.randint(-3, 4, shape, generator=draw).float()  # noqa: E731
    sums = gradient_sums.sums_of(weight, config) if in_place else None

    def use(counts: list[int]) -> torch.Tensor:
        ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
        y = grouped_linear.grouped_linear(integers(sum(counts), 16), weight, ends, sums)
        return (y * integers(*y.shape)).sum()

    ddp.zero_grad_buffer()
    with ddp.no_sync():
        (use(COUNTS[0]) + use(COUNTS[2])).backward()
        use(COUNTS[1]).backward()
    again = torch.ones((), requires_grad=True)
    inside = checkpoint(lambda x: x * use(COUNTS[0]), again, use_reentrant=True, preserve_rng_state=True)
    (inside + use(COUNTS[2])).backward()
    finalize_model_grads([ddp], pg_collection=None)
    return weight.main_grad.clone()


def sums_are_the_same(rank: int, world_size: int, overlap: bool) -> None:
    engine.install()
    with with_model_parallel(gloo_groups=True), stale_sums_are_nan() as left:
        expected, found = (
            [step(*weight_model(overlap), in_place, number) for number in range(3)]
            for in_place in (False, True)
        )
        for one, other in zip(expected, found, strict=True):
            assert one.any() and torch.equal(one, other)
        model = weight_model(overlap)
        for number, one in enumerate(expected):
            with mock.patch.object(
                gradient_sums, "setattr", mock.Mock(side_effect=setattr), create=True
            ) as claimed:
                assert torch.equal(step(*model, True, number), one)
            # five uses of a step, and its second attribute at each
            assert len(claimed.call_args_list) == 10 and left


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_sums_of_several_uses(gloo: Any, world_size: int, overlap: bool) -> None:
    gloo(world_size, sums_are_the_same, overlap)


def who_may_write(rank: int, world_size: int) -> None:
    engine.install()
    with with_model_parallel(gloo_groups=True):
        ddp, weight, config = weight_model(False)
        ddp.zero_grad_buffer()
        assert gradient_sums.sums_of(weight, config) is not None
        config.cuda_graph_impl = "local"
        assert gradient_sums.sums_of(weight, config) is None
        config.cuda_graph_impl, config.expert_gradients_in_place = "none", None
        assert gradient_sums.sums_of(weight, config) is not None
        config.expert_gradients_in_place = False
        assert gradient_sums.sums_of(weight, config) is None

        rows = torch.zeros(5, 8), torch.zeros(5, 16), torch.tensor([1, 1, 5], dtype=torch.int32)
        claim = lambda param, only_fast=False: gradient_sums.claim(param, *rows, only_fast=only_fast)  # noqa: E731
        stale = getattr(weight, gradient_sums.STALE)
        assert claim(weight, only_fast=True) is None and not getattr(weight, gradient_sums.WRITTEN)
        assert getattr(weight, gradient_sums.STALE) == stale
        assert claim(weight) is not None and getattr(weight, gradient_sums.WRITTEN)
        assert claim(weight, only_fast=True) is not None, "what comes second is not lost behind the first"
        ddp.zero_grad_buffer()
        assert not getattr(weight, gradient_sums.WRITTEN), "of a backward pass that was broken off"
        _, tied, _ = weight_model(False, zero_out_wgrad=True)
        half = torch.nn.Parameter(torch.zeros(2))
        setattr(half, gradient_sums.STALE, False)
        nobody = [tied, weight * 1, torch.nn.Parameter(torch.zeros(2)), half]
        for dtype in (torch.bfloat16, torch.float64):
            half.main_grad = torch.zeros(2, dtype=dtype)
            assert all(claim(param) is None for param in nobody)
        half.main_grad = torch.zeros(2)
        total, add = claim(half)
        assert total is half.main_grad and add


def test_who_may_write(gloo: Any) -> None:
    """A float32 sum, of a parameter whose hook is ours, with the flag or a fused kernel; others go by autograd."""
    gloo(1, who_may_write)

"""The first gradient of a step overwrites the sum of the last one: bit for bit what clearing and adding gives.

Sums that are left are filled with NaN here, as those of a whole step are in tests/training/tiny.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from linear_moe.training import engine, optimizer_step
from tests.training import stock_gpt
from tests.training.stock_gpt import MOE, TINY, pretrain_tiny
from tests.training.tiny import stale_sums_are_nan
from tests.workers import with_model_parallel

SIZES = dict(always=3, gate=65, late=64, expert=30, tied=7, twice=16, never=100)
MICRO_BATCHES = 3


def replaced() -> list[tuple[Any, str]]:
    """The methods of Megatron that are."""
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.distributed import param_and_grad_buffer as gradients

    return [
        (DistributedDataParallel, "zero_grad_buffer"),
        (DistributedDataParallel, "_make_backward_post_hook"),
        (gradients._ParamAndGradBuffer, "reset"),
        (gradients._ParamAndGradBucketGroup, "start_grad_sync"),
    ]


@contextmanager
def megatron() -> Iterator[None]:
    """Clears and adds."""
    with ExitStack() as stack:
        for owner, name in replaced():
            stack.enter_context(mock.patch.object(owner, name, engine.stock(owner, name)))
        yield


class Model:
    """Parameters that take part in all, some or no micro-batches of a step, or several times in one."""

    def __init__(self, overlap: bool = False, distributed: bool = True, **options: Any) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.module import MegatronModule

        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        config.finalize_model_grads_func = finalize_model_grads
        for name, value in options.items():
            setattr(config, name, value)
        module = MegatronModule(config)
        self.waits_for_all = overlap
        for name, size in SIZES.items():
            if self.waits_for_all and name == "never":
                continue  # Megatron itself wants a gradient of it
            dtype = torch.float32 if name == "gate" else torch.bfloat16
            param = torch.nn.Parameter((torch.arange(float(size)) % 7 - 3).to(dtype))
            if name == "expert":
                param.allreduce = False
            if name == "tied":
                param.zero_out_wgrad = True
            module.register_parameter(name, param)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=distributed, overlap_grad_reduce=overlap, bucket_size=50
        )  # fmt: skip
        self.ddp = DistributedDataParallel(config, ddp, module)
        self.params = dict(module.named_parameters())

    def step(self, number: int) -> dict[str, torch.Tensor]:
        """Its gradients."""
        from megatron.core.distributed import finalize_model_grads

        self.ddp.zero_grad_buffer()
        for index in range(MICRO_BATCHES):
            loss = self.loss(number, index)
            if index == MICRO_BATCHES - 1:
                loss.backward()
            else:
                with self.ddp.no_sync():
                    loss.backward()
        finalize_model_grads([self.ddp], pg_collection=None)
        return {name: param.main_grad.clone() for name, param in self.params.items()}

    def loss(self, number: int, index: int) -> torch.Tensor:
        draw = torch.Generator().manual_seed(100 * number + index + 10 * torch.distributed.get_rank())
        use = lambda name: (  # noqa: E731
            self.params[name].float().sin() * torch.randn(SIZES[name], generator=draw)
        ).sum()
        loss = use("always") + use("gate") + use("tied") * use("tied") + use("expert")
        if index == MICRO_BATCHES - 1:
            loss = loss + use("late")
        # A backward pass inside of the backward pass, as where layers are recomputed, and one outside.
        again = torch.ones((), requires_grad=True)
        inside = checkpoint(lambda x: x * use("twice"), again, use_reentrant=True, preserve_rng_state=True)
        return loss + inside + (self.params["twice"].float() ** 3).sum()


CASES: dict[str, dict[str, Any]] = {
    "shards": {},
    "shards, overlapped": dict(overlap=True),
    "replicas": dict(distributed=False),
    "replicas, overlapped": dict(distributed=False, overlap=True),
}


def same_as_adding(rank: int, world_size: int, case: dict[str, Any]) -> None:
    from megatron.core.distributed import param_and_grad_buffer as gradients

    engine.install()
    with with_model_parallel(gloo_groups=True), stale_sums_are_nan() as left:
        with megatron():
            stock = Model(**case)
            expected = [stock.step(number) for number in range(3)]
        ours = Model(**case)
        for number in range(3):
            left.clear()
            with mock.patch.object(torch, "_foreach_zero_", wraps=torch._foreach_zero_) as cleared:
                found = ours.step(number)
            assert {id(param) for param in left} == {id(param) for param in ours.params.values()}
            sizes = sorted(x.numel() for call in cleared.call_args_list for x in call.args[0])
            assert sizes == sorted(SIZES[name] for name in ("tied", "never") if name in ours.params)
            for name, grad in expected[number].items():
                assert torch.equal(found[name], grad), name
                assert grad.any() == (name != "never")
        for buffer in (*ours.ddp.buffers, *ours.ddp.expert_parallel_buffers):
            assert buffer.grad_data.isfinite().all(), "also between parameters"
        assert gradients._ParamAndGradBuffer.reset is not engine.stock(gradients._ParamAndGradBuffer, "reset")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_parameter_has_the_gradients_of_adding(gloo: Any, world_size: int, name: str) -> None:
    gloo(world_size, same_as_adding, CASES[name])


def who_is_cleared(rank: int, world_size: int) -> None:
    """Where something else may add to sums, or read them, all is as in Megatron."""
    engine.install()
    with with_model_parallel(gloo_groups=True):
        with megatron():
            before = Model()  # the hooks of its parameters are Megatron's
        others = [
            Model(finalize_model_grads_func=None),
            Model(finalize_model_grads_func=lambda *args, **kwargs: None),
            Model(gradient_accumulation_fusion=True),
            Model(cuda_graph_impl="local"),
        ]
        for model, is_cleared in [(before, True), *((other, True) for other in others), (Model(), False)]:
            for param in model.params.values():
                param.main_grad.fill_(1.0)
            model.ddp.zero_grad_buffer()
            assert all(param.main_grad.any() != is_cleared for param in model.params.values())


def test_who_is_cleared_as_before(gloo: Any) -> None:
    gloo(1, who_is_cleared)


PP2 = "--pipeline-model-parallel-size 2"
RUNS = {
    "one process, tied, experts recomputed": (
        1,
        f"{MOE} --bf16 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "PP2 VPP2 tied, overlapped": (
        2,
        f"{PP2} --num-virtual-stages-per-pipeline-rank 2 --use-distributed-optimizer --overlap-grad-reduce"
        " --overlap-param-gather",
    ),
    "EP2, shards": (2, f"{MOE} --expert-model-parallel-size 2 --use-distributed-optimizer --bf16"),
}


def trained(rank: int, world_size: int, flags: str, stock: bool) -> Any:
    tied = TINY.replace("--untie-embeddings-and-output-weights", "") if "tied" in flags else TINY
    flags = flags.replace("tied", "")
    engine.install()
    with mock.patch.object(stock_gpt, "TINY", tied), ExitStack() as stack:
        if stock:
            for name in ("leave_sums", "overwrite_stale", "mark_stale", "clear_stale"):
                stack.enter_context(mock.patch.object(optimizer_step, name, lambda original: original))
            pretrained = pretrain_tiny(rank, world_size, flags, 4)
        else:
            left = stack.enter_context(stale_sums_are_nan())
            pretrained = pretrain_tiny(rank, world_size, flags, 4)
            assert left, "nothing was left"
    engine.install()
    return pretrained


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_bit_for_bit(gloo: Any, name: str) -> None:
    world_size, flags = RUNS[name]
    flags += " tied" if "tied" in name else ""
    for one, other in zip(*(gloo(world_size, trained, flags, stock) for stock in (True, False)), strict=True):
        assert one["losses"] == other["losses"]
        for key, value in one["parameters"].items():
            assert torch.equal(other["parameters"][key], value), key
        assert len(one["adam"]) == len(other["adam"]) > 0
        for state, its in zip(one["adam"], other["adam"], strict=True):
            assert all(torch.equal(its[key], value) for key, value in state.items())

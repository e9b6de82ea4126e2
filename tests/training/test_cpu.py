"""The CPU platform: off where there is a CUDA device; elsewhere Megatron's ``pretrain()`` trains in every layout."""

import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from linear_moe.training import cpu, cpu_standins
from tests.training.stock_gpt import MOE, pretrain_tiny
from tests.workers import with_model_parallel

ROOT = Path(__file__).parents[2]
FULL_RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"


def is_standin(value: Any) -> bool:
    """Whether a name of torch holds something of ours."""
    code = getattr(value, "__code__", None)
    if code is not None:
        return code.co_filename == cpu_standins.__file__
    return getattr(value, "__module__", None) == cpu_standins.__name__ or isinstance(value, dict)


def current_values() -> list[Any]:
    return [getattr(patch.owner, patch.name) for patch in cpu.patches()]


# Off, with a CUDA device


def refused_with_cuda() -> None:
    torch.cuda.is_available = lambda: True
    before = current_values()
    filters = list(logging.getLogger("megatron.core.tensor_parallel.random").filters)
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        cpu.activate()
    assert not cpu.is_active() and not cpu.needed()
    assert all(now is was for now, was in zip(current_values(), before))
    assert logging.getLogger("megatron.core.tensor_parallel.random").filters == filters


def unchanged_by_import() -> None:
    assert len(current_values()) > 80
    assert not any(is_standin(value) for value in current_values())


def compiled_before() -> None:
    """Megatron's functions, where it was imported first (``import_model``, then a forward pass)."""
    twice = torch.compile(lambda x: 2 * x)
    cpu.activate()
    assert twice(torch.ones(2)).tolist() == [2, 2]


@pytest.mark.parametrize("check", ["refused_with_cuda", "unchanged_by_import", "compiled_before"])
def test_off(check: str) -> None:
    """In a process of its own: an earlier test may have imported the entry, which activates the platform here."""
    code = f"from tests.training import test_cpu; test_cpu.{check}()"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT, timeout=120)


def active_names(rank: int, world_size: int) -> list[str]:
    before = current_values()
    cpu.activate()  # a second time, which wraps nothing again
    assert all(one is other for one, other in zip(before, current_values(), strict=True))
    assert cpu.is_active() and cpu.needed()
    return [patch.name for patch, value in zip(cpu.patches(), current_values()) if not is_standin(value)]


def test_every_name_of_the_list_is_replaced_once_active(gloo) -> None:
    assert gloo(1, active_names) == [[]]


# What torch does then


def devices(rank: int, world_size: int) -> None:
    assert (
        torch.cuda.is_available() and torch.cuda.device_count() == 2 and torch.cuda.current_device() == rank
    )
    for device in ("cuda", "cuda:1", 0, torch.device("cuda"), f"cuda:{torch.cuda.current_device()}"):
        made = torch.zeros(2, 3, device=device)
        assert made.device.type == "cpu"
        assert torch.ones_like(made, device=device).device.type == "cpu"
        assert made.new_full((2,), 1.0, device=device).device.type == "cpu"
        assert made.to(device) is made and made.to(device=device, dtype=torch.float64).dtype == torch.float64
        assert torch.nn.Linear(3, 3).to(device)(made).device.type == "cpu"
    with torch.device("cuda"):
        assert torch.arange(3).device.type == "cpu"
    with torch.device("meta"):
        assert torch.empty(3).device.type == "meta"
    assert torch.empty(3, device="meta").to(torch.float16).device.type == "meta"
    assert torch.zeros(3, pin_memory=True).pin_memory().cuda().device.type == "cpu"
    assert torch.nn.Linear(3, 3).cuda().weight.device.type == "cpu"
    types = {dtype: torch.zeros(1, dtype=dtype).type() for dtype in (torch.float32, torch.bfloat16)}
    assert types == {torch.float32: "torch.cuda.FloatTensor", torch.bfloat16: "torch.cuda.BFloat16Tensor"}
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64


def streams_and_memory(rank: int, world_size: int) -> None:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(torch.cuda.Stream()), torch.cuda.device(0):
        start.record()
        end.record(torch.cuda.current_stream())
    torch.cuda.current_stream().wait_event(end)
    torch.cuda.synchronize()
    assert end.query() and start.elapsed_time(end) >= 0.0
    assert 0.0 <= end.elapsed_time(torch.cuda.current_stream().record_event()) < 1e5
    assert torch.cuda.max_memory_allocated() > 50 * 2**20 and torch.cuda.memory_allocated() == 0
    free, total = torch.cuda.mem_get_info()
    assert 2**28 < free < total == torch.cuda.get_device_properties(0).total_memory


def unequal_shapes(rank: int, world_size: int) -> list[list[float]]:
    """Gathered in a group that begins with rank 1; ``async_op`` is refused, not forgotten."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return []
    found = [torch.empty(1), torch.empty(2)]
    dist.all_gather(found, torch.full((rank,), float(rank)), group=group)
    with pytest.raises(AssertionError, match="no asynchronous form"):
        dist.all_gather(found, torch.zeros(rank), group=group, async_op=True)
    return [part.tolist() for part in found]


def test_gathering_unequal_shapes_within_a_group(gloo) -> None:
    assert gloo(3, unequal_shapes)[1:] == [[[1.0], [2.0, 2.0]]] * 2


def other_threads(rank: int, world_size: int) -> None:
    """A loss whose backward recomputes on "cuda", from a thread: both left a TorchFunctionMode behind."""

    class Recompute(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * torch.full((3,), 2.0, device="cuda")

    x = torch.ones(3, requires_grad=True)
    thread = threading.Thread(target=lambda: Recompute.apply(x).sum().backward())
    thread.start()
    thread.join()
    assert x.grad is not None and x.grad.tolist() == [2.0] * 3

    @torch.jit.script
    def scripted(y: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(y) + torch.ones([3])

    assert scripted(x).tolist() == [1.0] * 3


@pytest.mark.parametrize("check", [devices, streams_and_memory, other_threads])
def test_torch(gloo, check) -> None:
    gloo(2, check)


def collectives(rank: int, world_size: int) -> None:
    from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region

    sends = torch.tensor([[1, 2], [3, 1]])  # [from, to]
    x = torch.arange(int(sends[rank].sum()), dtype=torch.float32).add(10 * rank).requires_grad_()
    y = all_to_all(
        dist.group.WORLD, x, sends[:, rank], sends[rank]
    )  # as the dispatcher does: tensors of sizes
    expected = [[0.0, 10.0, 11.0, 12.0], [1.0, 2.0, 13.0]][rank]
    assert y.tolist() == expected
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1.0] * len(x)
    z = gather_from_sequence_parallel_region(
        torch.full((rank + 1, 2), float(rank)), group=dist.group.WORLD, output_split_sizes=[1, 2]
    )
    assert z[:, 0].tolist() == [0.0, 1.0, 1.0]


def test_collectives_of_unequal_sizes(gloo) -> None:
    gloo(2, collectives)


# The RNG


def draws(rank: int, world_size: int) -> dict[str, Any]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    class Records(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warned.append(record.getMessage())

    warned: list[str] = []
    logging.getLogger("megatron.core.tensor_parallel.random").addHandler(handler := Records())
    with with_model_parallel(tp=2):
        before = torch.cuda.get_rng_state()
        with get_cuda_rng_tracker().fork():
            own = torch.rand(4, device="cuda")
            state_inside = torch.cuda.get_rng_state()
        undisturbed = torch.equal(before, torch.cuda.get_rng_state())
        with get_cuda_rng_tracker().fork():
            goes_on = torch.equal(state_inside, torch.cuda.get_rng_state())
        if rank == 0:  # only ranks that read data make an iterator
            list(torch.utils.data.DataLoader([1, 2, 3], num_workers=1, pin_memory=True))
        shared = torch.rand(4, device="cuda")
        dropped = torch.nn.functional.dropout(torch.ones(64), 0.5)
        saved = torch.cuda.get_rng_state()
        again = torch.rand(4)
        torch.cuda.set_rng_state(saved)
        restored = torch.equal(again, torch.rand(4))
    logging.getLogger("megatron.core.tensor_parallel.random").removeHandler(handler)
    return {
        "own": own,
        "shared": torch.cat([shared, dropped]),
        "checks": (undisturbed, goes_on, restored),
        "warned": warned,
    }


def test_rng_differs_in_forks_and_agrees_outside(gloo) -> None:
    first, second = gloo(2, draws)
    assert first["checks"] == second["checks"] == (True, True, True)
    assert not torch.equal(first["own"], second["own"])
    assert torch.equal(first["shared"], second["shared"])
    assert first["warned"] == second["warned"] == []


def experts_and_others(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    return pretrain_tiny(rank, world_size, f"--expert-model-parallel-size 2 {MOE}", 1)["parameters"]


def test_experts_differ_over_ep_ranks_and_the_rest_agrees(gloo) -> None:
    first, second = gloo(2, experts_and_others)
    experts = [name for name in first if "experts.local_experts" in name]
    assert experts and first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]) == (name not in experts), name


# Training through Megatron's pretrain()


LAYOUTS = {
    "TP2": (2, "--tensor-model-parallel-size 2"),
    "PP2": (2, f"--pipeline-model-parallel-size 2 {MOE}"),
    "PP2 VPP2": (2, f"--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 {MOE}"),
    "EP2 dist-opt": (2, f"--expert-model-parallel-size 2 --use-distributed-optimizer {MOE}"),
    "PP2 EP2 dist-opt overlap": (
        4,
        "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --use-distributed-optimizer "
        f"--overlap-grad-reduce --overlap-param-gather {MOE}",
    ),
    "TP2 DP2 bf16": (4, "--tensor-model-parallel-size 2 --use-distributed-optimizer --bf16"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_trains(gloo, name: str) -> None:
    world_size, flags = LAYOUTS[name]
    losses = gloo(world_size, pretrain_tiny, flags, 4)[-1]["losses"]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.2


def test_data_parallel_equals_one_process(gloo) -> None:
    flags = f"--attention-dropout 0 --hidden-dropout 0 {MOE}"
    (alone,) = gloo(1, pretrain_tiny, flags, 4)
    both = gloo(2, pretrain_tiny, f"--use-distributed-optimizer {flags}", 4)
    assert both[0]["losses"] == both[1]["losses"]
    assert both[0]["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    for name, parameter in alone["parameters"].items():
        torch.testing.assert_close(both[0]["parameters"][name], parameter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flags", ["--tensor-model-parallel-size 2", f"--expert-model-parallel-size 2 {MOE}"])
def test_full_recompute_equals_none_with_dropout(gloo, flags: str) -> None:
    plain = gloo(2, pretrain_tiny, flags, 3)
    recomputed = gloo(2, pretrain_tiny, f"{flags} {FULL_RECOMPUTE}", 3)
    for one, other in zip(plain, recomputed):
        assert one["losses"] == other["losses"]
        assert all(torch.equal(other["parameters"][name], value) for name, value in one["parameters"].items())
        assert all(torch.equal(other["rng"][name], state) for name, state in one["rng"].items())

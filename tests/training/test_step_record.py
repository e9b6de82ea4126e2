"""The record of a step and of an evaluation, number by number, from what several ranks know."""

import io
import json
import math
import warnings
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.workers import with_model_parallel

PEAK = 1e6
ROOM = {"micro_batch_size": 3, "seq_length": 32, "progress_interval": 4, "train_iters": 10}


def lap(timer: str) -> float:
    """Half a second."""
    assert timer == "interval-time"
    return 0.5


def allocator(rank: int, retries: int) -> dict[str, int]:
    """What PyTorch says of it."""
    return {"allocated_bytes.all.peak": (rank + 1) * 2**29, "num_alloc_retries": retries}


def run_log(rank: int, folder: str, peak: float | None = PEAK) -> tuple[Any, Any]:
    """A log of a model of round numbers; around it four micro-batches, and more memory on later ranks."""
    from linear_moe.training import metrics
    from linear_moe.training.flops import FlopsPerToken

    around = patch.multiple(
        metrics,
        get_args=lambda: Namespace(**ROOM, world_size=2),
        get_timers=lambda: str,
        lap=lap,
        get_num_microbatches=lambda: 4,
        peak_flops=lambda: peak,
    )
    memory = patch.object(torch.cuda, "memory_stats", lambda: allocator(rank, 0))
    around.start(), memory.start()
    flops = FlopsPerToken(mixers=10, feed_forward=20, head=5, per_pair=4)
    log = metrics.RunLog(Path(folder), flops, [SimpleNamespace(take=lambda: {"moe_load": 1.25})])  # type: ignore
    return log, lambda: (around.stop(), memory.stop())


def three_steps(rank: int, world: int, folder: str) -> tuple[str, list[Any]]:
    """A plain step, one of packed documents without a peak to compare with, and one that was skipped."""
    stock: list[Any] = []
    printed = io.StringIO()
    log, stop = run_log(rank, folder)

    def original(*args: Any, **kwargs: Any) -> None:
        stock.append((args, kwargs))

    rate = None if rank == 0 else 0.1  # Megatron knows it on some ranks
    with with_model_parallel(), redirect_stdout(printed):
        write = log.wrap(original)
        for step, kwargs, skipped, loss in (
            (1, {}, 0, 3.0),
            (2, {"total_real_tokens_in_batch": 500.0, "seqlen_squared_sum_in_batch": 9000.0}, 0, 3.0),
            (4, {"more": 7}, 1, math.nan),
        ):
            totals = {"load_balancing_loss": torch.tensor(1.5), "lm loss": torch.tensor(9.0), "other": 1}
            losses = {"lm loss": torch.tensor([loss - 1, loss + 1])}
            found = write(losses, totals, rate, step, 1.0, True, skipped, 0.5, None, 3, **kwargs)
            assert found is False and totals == {}, "nothing is summed up for a line of Megatron's"
            args, sent = stock[-1]
            assert args[2:] == (rate, step, 1.0, False, skipped, 0.5, None, 3)
            assert sent == {**kwargs, "is_first_iteration": False}
    stop()
    return printed.getvalue(), [r["iteration"] for r in records(folder)] if rank == 1 else []


def records(folder: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_the_record_of_a_step(gloo, tmp_path: Path):
    """Written by the last rank; tokens of all ranks, memory of the fullest, and the model's FLOPs by hand."""
    (silent, _), (printed, _) = gloo(2, three_steps, str(tmp_path / "a" / "run"))
    plain, packed, skipped = records(tmp_path / "a" / "run")
    tokens = 3 * 2 * 4 * 32  # micro-batch, data-parallel ranks, micro-batches, sequence
    flops = 3 * ((10 + 20 + 5) * tokens + 4 * tokens * 32 / 2)
    assert plain == {
        "iteration": 1,
        "grad_norm": 0.5,
        "learning_rate": 0.1,
        "seconds": 0.5,
        "tokens": tokens,
        "tokens_per_second_per_gpu": tokens / 0.5 / 2,
        "tflops_per_gpu": pytest.approx(flops / 0.5 / 2 / 1e12),
        "mfu": pytest.approx(flops / 0.5 / 2 / PEAK),
        "peak_memory_gib": 1.0,
        "allocator_retries": 0,
        "moe_load": 1.25,
        "lm_loss": 3.0,
        "moe_load_balancing_loss": 1.5,
    }
    flops = 3 * (35 * 500 + 4 * 9000 / 2)
    assert packed["tokens"] == 500 and packed["tokens_per_second_per_gpu"] == 500
    assert packed["mfu"] == pytest.approx(flops / 0.5 / 2 / PEAK)
    assert skipped["skipped"] is True and math.isnan(skipped["lm_loss"]) and "skipped" not in plain
    assert silent == "" and [line.split()[1] for line in printed.splitlines()] == ["1/10", "4/10"]
    assert "SKIPPED" in printed.splitlines()[1]


def full_memory(rank: int, world: int, folder: str) -> tuple[list[str], list[int]]:
    """The counter of the first rank rises in all steps but the third and the last."""
    log, stop = run_log(rank, folder)
    totals = iter([1, 3, 3, 4, 6, 6]) if rank == 0 else iter([0] * 6)
    with (
        with_model_parallel(),
        warnings.catch_warnings(record=True) as told,
        patch.object(torch.cuda, "memory_stats", lambda: allocator(rank, next(totals))),
    ):
        warnings.simplefilter("always")
        write = log.wrap(lambda *args, **kwargs: None)
        for step in range(1, 7):
            write({}, {}, 0.1, step, 1.0, False, 0, None, None, None)
    stop()
    return [str(w.message) for w in told], [r["allocator_retries"] for r in records(folder)] if rank else []


def test_memory_that_is_all_but_full_is_said_once(gloo, tmp_path: Path):
    (silent, _), (told, counts) = gloo(2, full_memory, str(tmp_path))
    assert counts == [1, 2, 0, 1, 2, 0] and silent == []
    assert len(told) == 1 and "step 4: GPU memory is so full" in told[0] and "metrics.jsonl: 1," in told[0]


def spoiled(rank: int, world: int, folder: str) -> list[str]:
    """A gradient norm, and then a loss, that is not a number; on every rank."""
    log, stop = run_log(rank, folder)
    told = []
    with with_model_parallel():
        write = log.wrap(lambda *args, **kwargs: None)
        write({}, {}, 0.1, 5, 1.0, False, 0, None, None, None)  # nothing is known of it
        for norm, loss in ((math.nan, 1.0), (None, math.inf)):
            try:
                write({"lm loss": torch.tensor(loss)}, {}, 0.1, 6, 1.0, False, 0, norm, None, None)
            except ValueError as error:
                told.append(str(error))
    stop()
    return told


def test_a_step_that_is_not_a_number_ends_the_run(gloo, tmp_path: Path):
    for told in gloo(2, spoiled, str(tmp_path)):
        assert [text.split(", and")[0] for text in told] == [
            "step 6 has a gradient norm of nan",
            "step 6 has a loss of inf",
        ]
        assert all("\n  why: training diverged" in text and "\n  try: a lower LR" in text for text in told)
    assert [record["iteration"] for record in records(tmp_path)] == [5]


def evaluated(rank: int, world: int, folder: str) -> list[Any]:
    """What Megatron's two functions do around an evaluation; asked twice for the last step, it is done once."""
    log, stop = run_log(rank, folder)
    done: list[Any] = []
    hooks = log.evaluation()
    losses = iter([{"lm loss": torch.tensor(2.0)}, {"lm loss": torch.tensor(25.0)}, None])
    evaluate = hooks["evaluate"](lambda *, asked: (next(losses), asked))

    def stock(prefix: str, forward: Any, data: Any, model: Any, iteration: int, *, config: str) -> Any:
        done.append((prefix, iteration))
        return evaluate(asked=config)

    with with_model_parallel():
        noted = hooks["evaluate_and_print_results"](stock)
        for prefix, step in (
            ("iteration 5", 5),
            ("iteration 10 on validation set", 10),
            ("iteration 10 on test set", 10),
        ):
            assert noted(prefix, None, None, None, step, config="it")[1] == "it"
            if "validation" in prefix:
                assert noted(prefix, None, None, None, step, config="it") is None
    stop()
    return done


def test_the_record_of_an_evaluation(gloo, tmp_path: Path):
    _, done = gloo(2, evaluated, str(tmp_path))
    assert [step for _, step in done] == [5, 10, 10] and done[2][0].endswith("test set")
    first, second = records(tmp_path)
    assert first == {
        "iteration": 5,
        "validation_loss": 2.0,
        "validation_perplexity": pytest.approx(math.e**2),
    }
    assert second["validation_perplexity"] == pytest.approx(math.exp(20)), "as Megatron prints it"


def loads(rank: int, world: int) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Tokens that two ranks' routers of layers 2 and 3 gave to 4 experts; and tallies of two mixtures, twice."""
    from megatron.core.transformer.moe.router import Router

    from linear_moe.training.memory_load import MemoryLoad
    from linear_moe.training.metrics import ExpertLoad

    class Fixed(Router):
        def __init__(self, layer: int, chosen: list[list[int]]) -> None:
            torch.nn.Module.__init__(self)
            self.layer_number, self.map = layer, torch.tensor(chosen)

        def forward(self, x: Any) -> Any:
            return self.map * 0.5, self.map.bool()

        def gating(self, x: Any) -> Any: ...
        def routing(self, x: Any) -> Any: ...

    second = [[1, 1, 0, 0], [1, 1, 0, 0]] if rank == 0 else [[1, 0, 1, 0], [1, 0, 1, 0]]
    routers = torch.nn.ModuleList([Fixed(2, second), Fixed(3, [[1, 1, 1, 1]])])
    other = torch.tensor([[0, 0, 0, 1]])
    load, found = ExpertLoad(3, 4), []
    load.watch(routers)
    for _ in range(2):
        for router in routers:
            router(None)
            with patch.object(router, "map", other):
                with torch.no_grad():  # the first pass of a layer that is computed again
                    router(None)
                router.eval()(None)
                router.train()
        found.append(load.take())
    found.append(load.take())
    memories = MemoryLoad(4, {1: 2, 3: 3})
    with with_model_parallel(cp=2):
        for layer, taken in ((1, [2.0, 1.0, 0.5, 1.5]), (3, [4.0, 2.0, 1.0, 2.0, 1.0 + rank])):
            balance = SimpleNamespace(layer=layer, take=lambda taken=taken: torch.tensor(taken))
            memories._layers.append(SimpleNamespace(balance=balance))  # type: ignore[arg-type]
        return found, memories.take()


def test_the_loads_of_experts_and_memories(gloo):
    """Layer 2: 4, 2, 2 and 0 tokens of 8; layer 3 is even; layer 1 is dense and does not count."""
    for found, memories in gloo(2, loads):
        for figures in found[:2]:
            assert figures == {
                "moe_load_max_over_mean": pytest.approx((4 / 2 + 1) / 2),
                "moe_load_min_over_mean": pytest.approx((0 / 2 + 1) / 2),
                "moe_idle_experts": pytest.approx(0.5),
            }
        assert set(found[2].values()) == {0.0}, "counted once"
        assert memories == {
            "memory_layers": [1, 3],
            "memory_balance": [pytest.approx(2 * 2 / 4), pytest.approx(2 * 4 / 8)],
            "memory_load": [[0.25, 0.75], [0.25, 0.5, pytest.approx(3 / 8)]],
        }

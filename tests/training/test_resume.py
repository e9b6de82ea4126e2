"""A run stopped and started again is the same run, bit for bit; a checkpoint opens under any layout."""

import argparse
import itertools
import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from linear_moe.training import engine
from tests.training.parity import rows_of
from tests.training.tiny import ARGUMENTS, DISTRIBUTED_OPTIMIZER, EXPERTS, checkpoint, losses, records, train
from tests.workers import Pool

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "tp2": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "cp2": (2, ["--context-parallel-size", "2"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
    "ep2": (2, ["--expert-model-parallel-size", "2"]),
}

KINDS = "gated_deltanet,gla,linear_attention,softmax"
SHARING = "rwkv7,hgrn2,mamba2,rwkv7,hgrn2,mom_gated_deltanet"
"""Mixers whose layers share tables or a value, with groups and memories; on two stages each but the last two."""


def arguments(run: Path, *extra: str, kinds: str = KINDS) -> list[str]:
    folder = str(run / "checkpoint")
    return [
        *ARGUMENTS,
        *EXPERTS,
        *("--layer-kinds", kinds, "--num-layers", str(kinds.count(",") + 1)),
        *("--train-iters", "10", "--save-interval", "5", "--hidden-dropout", "0.1"),
        *("--run-dir", str(run), "--save", folder, "--load", folder),
        *extra,
    ]


CASES = [(layout, "distributed", KINDS) for layout in LAYOUTS]
CASES += [(layout, optimizer, KINDS) for optimizer in ("plain", "bf16") for layout in ("one process", "tp2")]
CASES += [("one process", "distributed", SHARING), ("pp2", "bf16", SHARING)]
CASES += [("cp2", "buckets", KINDS), ("tp2", "buckets", SHARING)]
BUCKETS = [
    *DISTRIBUTED_OPTIMIZER,
    "--overlap-grad-reduce",
    "--overlap-param-gather",
    "--ddp-bucket-size",
    "1000",
]
OPTIMIZERS = {
    "distributed": DISTRIBUTED_OPTIMIZER,
    "plain": [],
    "bf16": [*DISTRIBUTED_OPTIMIZER, "--bf16"],
    "buckets": BUCKETS,
}


@pytest.mark.parametrize("layout,optimizer,kinds", CASES)
def test_a_resumed_run_is_the_uninterrupted_one(layout, optimizer, kinds, gloo, tmp_path):
    world, flags = LAYOUTS[layout]
    flags = [*flags, *OPTIMIZERS[optimizer], "--micro-batch-size", str(rows_of(layout))]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    uninterrupted = gloo(world, train, arguments(whole, *flags, kinds=kinds))
    gloo(world, train, arguments(parts, *flags, "--exit-interval", "5", kinds=kinds))
    assert len(losses(parts)) == 5
    resumed = gloo(world, train, arguments(parts, *flags, kinds=kinds))
    assert losses(parts) == losses(whole)
    for rank, (one, other) in enumerate(zip(uninterrupted, resumed, strict=True)):
        assert one["rng"] == other["rng"], f"random states of rank {rank} differ"
    gloo(1, assert_equal_checkpoints, *(run / "checkpoint" / "iter_0000010" for run in (whole, parts)))


def test_the_schedule_of_a_run_whose_batch_changes_ends_with_it(gloo, tmp_path):
    """It counts sequences: after steps twice as large, two steps go as far as one would have gone."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    rates = ["--min-lr", "1e-5", "--override-opt_param-scheduler"]

    def learn(folder: Path, batch: int, steps: int, *more: str) -> list[float]:
        many = ["--global-batch-size", str(batch), "--train-iters", str(steps)]
        many += ["--lr-warmup-iters", str(4 // batch)]
        gloo(1, train, arguments(folder, *rates, *many, *more, kinds="gla"))
        return [step["learning_rate"] for step in records(folder)]

    one_size = learn(whole, 4, 8)
    learn(run, 4, 8, "--exit-interval", "4")
    halves = learn(run, 2, 12)
    assert len(halves) == 12
    assert halves[:4] == one_size[:4] and halves[4::2] == pytest.approx(one_size[4:], rel=1e-6)
    assert all(rate > later for rate, later in itertools.pairwise(halves[1:])), (
        "it comes down to the last step"
    )


def the_schedule_after_loading(rank: int, world_size: int, samples: int, override: bool) -> tuple[int, int]:
    import megatron.training.training as training

    engine.install()
    moved = []
    scheduler = argparse.Namespace(
        num_steps=60, lr_decay_steps=200, override_opt_param_scheduler=override, step=moved.append
    )
    args = argparse.Namespace(consumed_train_samples=samples, global_batch_size=20)
    loaded = engine._end_the_schedule_with_the_run(lambda *a, **k: (5, 7.0))
    with mock.patch("megatron.training.get_args", lambda: args):
        assert loaded([], None, scheduler) == loaded([], None, None) == (5, 7.0)
    assert training.load_checkpoint is not engine.stock(training, "load_checkpoint")
    return scheduler.lr_decay_steps, len(moved)


@pytest.mark.parametrize(
    ("samples", "override", "end"),
    [(50, True, 150), (100, True, 200), (0, True, 200), (50, False, 200)],
    ids=["other batches", "the same, two steps skipped", "unknown", "of the checkpoint"],
)
def test_where_the_schedule_ends(gloo, samples: int, override: bool, end: int) -> None:
    ((found, moved),) = gloo(1, the_schedule_after_loading, samples, override)
    assert found == end and moved == (override and samples > 0)


def failure(rank: int, world: int, argv: list[str]) -> str:
    try:
        train(rank, world, argv)
    except ValueError as error:
        return str(error)
    return ""


def other_variables(rank: int, world: int, argv: list[str]) -> str:
    mine = ["--tensorboard-dir", f"{argv[-1]}/{rank}/here"]
    return failure(rank, world, [*argv, *mine, *(["--lr", "2e-4", "--log-params-norm"] if rank == 1 else [])])


def test_nodes_with_other_variables_are_refused(gloo, tmp_path):
    for told in gloo(2, other_variables, arguments(tmp_path / "run", kinds="gla")):
        what, why, instead = told.splitlines()
        assert what == (
            "process 1 was started with other variables than process 0: "
            "--lr: 1e-4 -> 2e-4; --log-params-norm: not set -> on"
        )
        assert why.startswith("  why: ") and instead.startswith(
            "  try: the same script and variables on every node"
        )
    assert not (tmp_path / "run" / "config.json").exists()


def test_an_attempt_that_cannot_resume_leaves_the_config_as_it_was(gloo, tmp_path):
    run = tmp_path / "run"
    small = ["--train-iters", "1", "--lr-warmup-iters", "0", "--override-opt_param-scheduler"]
    gloo(1, train, arguments(run, *small, kinds="gla"))
    config = (run / "config.json").read_text()
    wider = ["--train-iters", "2", "--gla-gate-rank", "5"]
    (told,) = gloo(1, failure, arguments(run, *wider, kinds="gla"))
    what, why, instead = told.splitlines()
    assert what.startswith(f"step 1 of {run}/checkpoint cannot be loaded: ") and "low_rank" in what
    assert why.startswith("  why: ") and instead == "  try: a copy of it, or another RUN_NAME"
    assert (run / "config.json").read_text() == config
    gloo(1, train, arguments(run, *small, "--train-iters", "2", kinds="gla"))
    assert len(losses(run)) == 2 and (run / "config.json").read_text() != config


def test_a_run_that_diverges_says_so_and_saves_nothing_of_it(gloo, tmp_path):
    run = tmp_path / "run"
    rate = ["--lr", "1e30", "--min-lr", "1e30", "--save-interval", "1"]
    told = gloo(2, failure, arguments(run, *LAYOUTS["pp2"][1], *rate, kinds="gla,softmax"))
    assert told[0] == told[1]
    what, why, instead = told[0].splitlines()
    assert what.startswith("step 3 has a gradient norm of nan") and why.startswith("  why: ")
    assert instead.startswith("  try: a lower LR")
    assert [step["iteration"] for step in records(run)] == [1, 2]
    assert (run / "checkpoint" / "latest_checkpointed_iteration.txt").read_text() == "2"


def test_evaluations_are_in_the_metrics(gloo, tmp_path):
    """With their step, behind it, from the last stage; a run that goes on writes again what it does again."""
    run = tmp_path / "run"
    every = ["--train-iters", "4", "--save-interval", "3", "--eval-iters", "1", "--eval-interval", "2"]
    flags = [*LAYOUTS["pp2"][1], *DISTRIBUTED_OPTIMIZER, *every]
    gloo(2, train, arguments(run, *flags, kinds="gla,softmax"))
    order = [(1, "lm_loss"), (2, "lm_loss"), (2, "validation_loss"), (3, "lm_loss"), (4, "lm_loss")]
    order += [(4, "validation_loss"), (4, "test_loss")]

    def places() -> list[tuple[int, str]]:
        names = {name for _, name in order}
        return [(record["iteration"], *names & record.keys()) for record in records(run)]

    assert places() == order, "every two steps, the last of which is also the end: once"
    first = records(run)
    assert all(4 < r["validation_loss"] < 6 for r in first if "validation_loss" in r)
    assert first[2]["validation_perplexity"] == math.exp(first[2]["validation_loss"])
    (run / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("3")
    gloo(2, train, arguments(run, *flags, kinds="gla,softmax"))
    assert places() == order and losses(run) == [r["lm_loss"] for r in first if "lm_loss" in r]
    gloo(2, train, arguments(run, *flags, kinds="gla,softmax"))
    assert places() == order, "a run that has ended is evaluated once more"


def assert_equal_checkpoints(rank: int, world: int, first: Path, second: Path) -> None:
    tensors, common = checkpoint(first)
    other_tensors, other_common = checkpoint(second)
    assert tensors.keys() == other_tensors.keys()
    assert any("exp_avg_sq" in key for key in tensors)
    for key, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[key]), f"{key} differs"
    for key in ("optimizer", "opt_param_scheduler", "iteration", "num_floating_point_operations_so_far"):
        assert same(common.get(key), other_common.get(key)), f"{key} differs"


def same(a: Any, b: Any) -> bool:
    """Equality of nested containers that hold tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


TP2_PP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--pipeline-model-parallel-size", "2"]
ELSEWHERE = [(KINDS, (4, TP2_PP2), target) for target in ("one process", "cp2", "ep2")]
ELSEWHERE += [(SHARING, LAYOUTS["pp2"], target) for target in ("one process", "tp2")]
ELSEWHERE += [(SHARING, LAYOUTS["tp2"], "pp2"), (KINDS, (2, BUCKETS), "one process")]
NO_CHANCE = [*DISTRIBUTED_OPTIMIZER, "--hidden-dropout", "0"]
"""Every layout draws its own random numbers."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, _pool: Pool) -> Callable[..., Path]:
    """A run that saved after steps 5 and 10, by its mixers and layout."""

    @cache
    def of(kinds: str, world: int, *flags: str) -> Path:
        run = tmp_path_factory.mktemp("saved")
        _pool.run(world, train, arguments(run, *flags, *NO_CHANCE, kinds=kinds))
        return run

    return of


@pytest.mark.parametrize("kinds,source,target", ELSEWHERE)
def test_a_checkpoint_opens_elsewhere(kinds, source, target, gloo, saved, tmp_path):
    """The optimizer comes along: step 6 there is step 6 of the run that saved, to rounding."""
    run = tmp_path / "run"
    shutil.copytree(saved(kinds, source[0], *source[1]), run)
    expected, before = losses(run), records(run)
    (run / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("5")
    world, flags = LAYOUTS[target]
    gloo(world, train, arguments(run, *flags, *NO_CHANCE, "--no-load-rng", kinds=kinds))
    assert len(expected) == 10 and records(run)[:5] == before[:5]
    assert all(step != earlier for step, earlier in zip(records(run)[5:], before[5:], strict=True)), "seconds"
    torch.testing.assert_close(torch.tensor(losses(run)), torch.tensor(expected), rtol=1e-5, atol=0)

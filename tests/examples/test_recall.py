"""The recall experiment: its data, its rule of equal memory, its training and its bookkeeping."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

RECALL = Path(__file__).parents[2] / "examples" / "recall"
sys.path.insert(0, str(RECALL))

import mqar  # noqa: E402
import tables  # noqa: E402

TASK = mqar.Task(pairs=(2, 5, 16), length=80, num_keys=24, num_fillers=4)


def test_every_answer_is_the_value_of_its_key() -> None:
    tokens, targets = mqar.mixture(TASK, 40, (1,))
    assert tokens.shape == targets.shape == (120, 80)
    for row, (sequence, answers) in enumerate(zip(tokens.tolist(), targets.tolist())):
        num_pairs = TASK.pairs[row % 3]
        written = sequence[: 2 * num_pairs]
        value_of = dict(zip(written[::2], written[1::2]))
        assert len(value_of) == num_pairs, "a key is written twice"
        assert all(key < 24 <= value < 48 for key, value in value_of.items())
        assert answers[: 2 * num_pairs] == [mqar.IGNORE] * (2 * num_pairs)
        asked = []
        for token, answer in zip(sequence[2 * num_pairs :], answers[2 * num_pairs :]):
            if token >= 48:
                assert answer == mqar.IGNORE, "filler has no answer"
            else:
                assert value_of[token] == answer
                asked.append(token)
        assert sorted(asked) == sorted(value_of), "every key is asked once"


def test_the_same_seed_gives_the_same_sequences() -> None:
    first, again, other = (mqar.mixture(TASK, 3, seed) for seed in ((1, 7), (1, 7), (1, 8)))
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not np.array_equal(first[0], other[0])


def test_queries_come_early_and_late_by_the_power_law() -> None:
    task = mqar.Task(pairs=(1,), length=66, num_keys=4)
    _, targets = mqar.mixture(task, 20000, (0,))
    slots = (np.nonzero(targets != mqar.IGNORE)[1] - 2) // 2
    weight = np.arange(1, 33) ** (task.power - 1.0)
    share = np.bincount(slots, minlength=32) / len(slots)
    np.testing.assert_allclose(share, weight / weight.sum(), atol=0.015)


def test_a_task_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="try: --length 64"):
        mqar.Task(pairs=(16,), length=60)


def test_claims_and_intervals_are_what_they_say() -> None:
    mean, half = tables.interval([0.4, 0.5, 0.6])
    assert mean == pytest.approx(0.5) and half == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    cells = {}
    for seed, (delta, gla) in enumerate(zip((0.9, 0.92, 0.91), (0.5, 0.55, 0.5))):
        for model, accuracy in (("gated_deltanet", delta), ("gla", gla), ("gla+softmax", gla)):
            cells[model, "64", seed] = {"accuracy": {"4": accuracy, "8": accuracy}}
    found = {row["claim"]: row["verdict"] for row in tables.claims(cells)}
    assert found == {"delta rule over decay": "shown", "hybrid over pure": "not shown"}
    for model in ("gated_deltanet", "gla+softmax"):  # cut off before they had learned anything
        cells |= {
            (model, "64", seed): cells[model, "64", seed] | {"short_of_time": True} for seed in range(3)
        }
    assert not tables.claims(cells)


def test_what_was_cut_off_earlier_does_not_count(tmp_path: Path) -> None:
    """A run of a minute goes on in a folder where others were cut off after ten."""
    store, key = tables.Store(tmp_path), ("gla", "64", 0)
    cell = dict(zip(("model", "size", "seed"), key)) | {"setup": "one"}
    for found, counts in (
        ({"error": "out of memory"}, True),
        ({"steps": 900}, True),
        ({"steps": 50}, False),
        ({"error": "out of memory"}, False),
        ({"steps": 300, "complete": True}, True),
        ({"steps": 1500}, False),
    ):
        store.add([cell | found])
        assert (store.cells("one")[key] == cell | found) == counts


def test_a_row_is_of_the_start_that_did_best_over_all_seeds() -> None:
    first, second = (
        {
            (model, "64", seed): {"setup": setup, "accuracy": {"4": accuracy}}
            for model, accuracies in found.items()
            for seed, accuracy in enumerate(accuracies)
        }
        for setup, found in (
            ("a", {"gla": (0.2, 0.3), "mamba2": (0.8, 0.1), "kda": (0.5,)}),
            ("b", {"gla": (0.4, 0.3), "mamba2": (0.4, 0.4), "retention": (0.6,), "kda": (0.1, 0.2)}),
        )
    )
    best = tables.chosen([first, second, {("gla", "64", 0): {"setup": "c", "accuracy": {"4": 1.0}}}])
    found = {(model, seed): cell["setup"] for (model, _, seed), cell in best.items()}
    assert found == {
        **{("gla", 0): "b", ("gla", 1): "b", ("mamba2", 0): "a", ("mamba2", 1): "a"},
        **{("retention", 0): "b", ("kda", 0): "b", ("kda", 1): "b"},
    }


def test_a_seed_that_only_another_start_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that failed, for instance: the row is still of the start with the better mean."""
    import run

    setups = run.setups_of(run.arguments(["--lr", "3e-3", "--pairs", "4", "--results", str(tmp_path)]))
    facts = {"state_size": 1, "parameters": 1, "options": {}}
    store, done = tables.Store(tmp_path), {"facts": facts, "steps": 1, "short_of_time": False, "seconds": 1}
    for setup, accuracies in zip(setups, ((0.2, 0.3, None), (0.4, 0.5)), strict=True):
        for seed, x in enumerate(accuracies):
            found = {"error": "out of memory"} if x is None else done | {"accuracy": {"4": x}}
            cell = {"model": "gla", "size": "1024", "seed": seed, "setup": setup.fingerprint()}
            store.add([cell | found])
    monkeypatch.setattr(tables, "plot", lambda *arguments: None)
    tables.write(store, setups)
    (row,) = json.loads((tmp_path / "recall.json").read_text())["rows"]
    assert (row["init_std"], row["tried"], row["mean"][0]) == (0.08, 2, pytest.approx(0.45))


def test_another_start_is_tried_where_the_first_left_something(tmp_path: Path) -> None:
    import cells
    import run

    flags = ["--lr", "3e-3", "--models", "gla", "kda", "--hybrids", "--ladder", "--results", str(tmp_path)]
    given = run.arguments(flags)
    first, second = setups = run.setups_of(given)
    assert (first.init_std, second.init_std) == (0.02, 0.08)
    model, _ = cells.build(cells.Job("gla", "default", (0,)), second, 0)
    assert model.output_layer.weight.std().item() == pytest.approx(0.08, rel=0.05)
    jobs = [job for job in run.jobs_of(given) if job.size == "1024"]
    store = tables.Store(tmp_path)
    for model, accuracies in (("gla", (1.0, 1.0, 0.95)), ("kda", (1.0, 1.0, 0.9))):
        lines = [
            {"model": model, "size": "1024", "seed": i, "accuracy": {"4": x}}
            for i, x in enumerate(accuracies)
        ]
        store.add([cell | {"setup": first.fingerprint(), "complete": True} for cell in lines])
    store.add([{"model": "kda", "size": "1024", "seed": 1, "setup": second.fingerprint(), "complete": True}
               | {"accuracy": {"4": 1.0}}])  # fmt: skip
    assert run._left(jobs, first, setups, given, store) == []
    (left,) = run._left(jobs, second, setups, given, store)
    assert (left.model, left.seeds) == ("kda", (0, 2))


def test_memory_of_equal_size() -> None:
    import cells

    from linear_moe import lsm

    setup = cells.Setup()
    for kind in lsm.names():
        for wanted in (1024, 4096):
            mixer = cells.make(kind, cells.options(kind, str(wanted), setup), setup)
            assert abs(math.log2(cells.state_size(mixer) / wanted)) < 0.35, (kind, wanted)
            assert mixer.cfg.hidden_size == setup.hidden_size
    plain = cells.make("linear_attention", cells.options("linear_attention", "2048", setup), setup)
    assert (plain.cfg.num_heads, plain.memory_shapes()) == (2, ((32, 32),)), "as wide as the model"
    assert plain.cfg.conv_size == setup.conv_size


SMALL = (
    "--pairs 1 2 --length 8 --num-keys 4 --hidden-size 32 --state-size 128 --steps 4 --per-pairs 4 --seeds 2"
)
FLAGS = [
    *SMALL.split(),
    *("--init-std", "0.02", "--lr", "3e-3"),
    "--models",
    "gla",
    "softmax",
    "--hybrids",
    "--ladder",
    "--results",
]


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cells that are there are not trained again, one that was cut off is; table and plot are made."""
    command = [
        sys.executable,
        str(RECALL / "run.py"),
        *FLAGS,
        str(tmp_path),
        "--processes",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "6 cells, 0 of them finished before" in done.stdout and done.stderr == ""
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [(c["model"], c["seed"], c["steps"]) for c in found].count(("softmax", 1, 4)) == 1
    cut_off: dict[str, Any] = found[0] | {"complete": False}
    (tmp_path / "cells.jsonl").write_text("\n".join([json.dumps(cut_off), *lines[1:], '{"half a li']) + "\n")

    import run

    run.main([*FLAGS, str(tmp_path), "--processes", "0"])
    assert "5 of them finished before or not needed; 1 to train" in capsys.readouterr().out
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == len(lines) + 2
    table = json.loads((tmp_path / "recall.json").read_text())
    assert [row["seeds"] for row in table["rows"]] == [2, 2, 2]
    assert "| softmax | KV cache |" in (tmp_path / "recall.md").read_text()
    assert (tmp_path / "recall.png").stat().st_size > 10_000
    other, *_ = run.setups_of(run.arguments([*FLAGS, str(tmp_path), "--lr", "1e-3"]))
    assert not tables.Store(tmp_path).finished(other.fingerprint()), "another learning rate is another table"
    capsys.readouterr()
    for flags in (
        *(["--lr", "1e-3", *late] for late in (["--report-only"], ["--minutes", "0", "--processes", "0"])),
        *([names, "glaa"] for names in ("--models", "--hybrids")),
    ):
        before = (tmp_path / "recall.md").stat().st_mtime_ns
        code = run.main([*FLAGS, str(tmp_path), *flags])
        what, why, instead = capsys.readouterr().err.splitlines()
        assert code == 2 and what.startswith("linear_moe: ") and why.startswith("  why: ")
        assert instead.startswith("  try: ") and (tmp_path / "recall.md").stat().st_mtime_ns == before
    assert run.main([*FLAGS, str(tmp_path), "--report-only"]) == 0


def test_gated_deltanet_learns_to_recall() -> None:
    import cells
    import gang

    task = mqar.Task(pairs=(2, 3, 4), length=18, num_keys=8, num_fillers=2)
    setup = cells.Setup(task=task, num_layers=1, steps=150, per_pairs=16, lr=1e-2, test_per_pairs=64)
    (cell,) = gang.train_gang(
        cells.Job("gated_deltanet", "default", (0,)), setup, record=False, limits=gang.Limits(seconds=60)
    )
    assert min(cell.accuracy.values()) > 0.9, cell


def test_one_recorded_model_is_enough_to_go_on_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three that cannot be recorded spare the others the attempt, until another one could."""
    import cells
    import run

    class Process:
        def __init__(self, outcome: str = "", value: Any = None) -> None:
            self.recv, self.sent = lambda: (outcome, value), []
            self.send = self.sent.append

    monkeypatch.setenv("PYTHONWARNINGS", "default")  # which a pool changes
    job = cells.Job("gla", "1024", (0,))
    found = {"model": "gla", "size": "1024", "seed": 0, "setup": "a", "accuracy": {"4": 1.0}, "steps": 1}
    recorded = ("done", [found | {"seconds": 1.0, "graph": True}])
    unrecorded, pool = ("unrecorded", "no"), run.Pool(None, None, 1)
    for answer, still in ((unrecorded, True), (unrecorded, True), (unrecorded, False), (recorded, True)):
        process, work, idle = Process(*answer), deque([(job, True)]), Process()
        pool.busy[process] = (mock.Mock(), (job, True))
        pool._take(process, work, tables.Store(tmp_path))
        pool.idle = [(idle, mock.Mock())]
        pool._give(work.pop())
        assert idle.sent == [(job, still)]
        if answer is unrecorded:
            assert list(work) == [(job, False)], "that one is not tried again"

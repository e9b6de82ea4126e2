"""Recall against memory: train a tiny model of every mixer on MQAR, then write a table and a plot.

    python examples/recall/run.py --quick                 a few mixers, on a CPU, about a minute
    python examples/recall/run.py --minutes 9             everything, on one GPU

Results go to `results/` beside this file as they come: `cells.jsonl` (one line for each model, size and seed; a
run that is started again skips those), and `recall.json`, `recall.md` and `recall.png` made from it. README.md says
what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections import deque
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import mqar  # noqa: E402
import tables  # noqa: E402

from linear_moe.inference.quiet import no_messages  # noqa: E402

HYBRIDS = ("linear_attention", "gla", "gated_deltanet", "mamba2")
LADDER = ("linear_attention", "gla", "gated_deltanet")
QUICK = ("linear_attention", "gated_deltanet")
GRACE = 20
"""Seconds after the deadline in which processes may test what they have."""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="*", help="mixers, and softmax; default: all that are registered")
    add("--hybrids", nargs="*", help=f"mixers in a stack with softmax; default: of {' '.join(HYBRIDS)}")
    add(
        "--ladder",
        nargs="*",
        help=f"mixers at a quarter and four times the size; default: of {' '.join(LADDER)}",
    )
    add("--state-size", type=int, default=1024, help="elements of memory per layer at equal size")
    add("--seeds", type=int, default=3, help="models of each kind")
    add(
        "--pairs",
        type=int,
        nargs="+",
        default=[2, 4, 8, 16, 32],
        help="numbers of pairs, trained as a mixture",
    )
    add("--length", type=int, default=128, help="tokens of a sequence")
    add("--num-keys", type=int, default=64, help="keys in the vocabulary, and as many values")
    add("--num-fillers", type=int, default=16, help="tokens of the vocabulary that mean nothing")
    add("--hidden-size", type=int, default=64, help="width of the two-layer model")
    add(
        "--conv-size",
        type=int,
        default=4,
        help="short convolution of every mixer that has one; 0: its own default",
    )
    add("--steps", type=int, default=1500, help="optimizer steps")
    add("--per-pairs", type=int, default=16, help="sequences of each number of pairs in a batch")
    add("--lr", type=float, nargs="+", default=[3e-3, 1e-3], help="peak learning rates to try")
    add("--init-std", type=float, nargs="+", default=[0.02, 0.08], help="of the weights at the start, to try")
    add(
        "--enough",
        type=float,
        default=0.98,
        help="mean accuracy with which a model is not tried with another start",
    )
    add("--minutes", type=float, help="stop after so long with what there is")
    add("--gang-seconds", type=float, help="stop one model's seeds after so long (marked in the table)")
    add(
        "--processes",
        type=int,
        help="models trained at a time; default: 6 on a GPU, one for each core on a CPU; 0: this one",
    )
    add(
        "--no-graph",
        action="store_true",
        help="launch every kernel of every step instead of a recorded graph",
    )
    add("--results", type=Path, default=HERE / "results", help="folder of the results")
    add("--report-only", action="store_true", help="train nothing, make table and plot anew")
    add("--quick", action="store_true", help="a few mixers, few pairs, one seed, in results/quick")
    given = parser.parse_args(argv)
    if given.quick:
        quick: dict[str, Any] = dict(
            models=list(QUICK), hybrids=[], ladder=[], seeds=1, pairs=[2, 3, 4], length=18, num_keys=8, num_fillers=2,
            state_size=512, steps=150, lr=[5e-3], init_std=[0.02], results=HERE / "results" / "quick",
        )  # fmt: skip
        for name, value in quick.items():
            if getattr(given, name) == parser.get_default(name):
                setattr(given, name, value)
    return given


def setups_of(given: argparse.Namespace) -> list[Any]:
    """The options that every cell shares, once for each learning rate and start that is tried, in this order."""
    import cells

    task = mqar.Task(tuple(sorted(given.pairs)), given.length, given.num_keys, given.num_fillers)
    return [
        cells.Setup(
            task=task,
            hidden_size=given.hidden_size,
            conv_size=given.conv_size,
            steps=given.steps,
            per_pairs=given.per_pairs,
            lr=lr,
            init_std=init_std,
        )
        for init_std in given.init_std
        for lr in given.lr
    ]


def jobs_of(given: argparse.Namespace) -> list[Any]:
    """What to train, the most telling first."""
    import cells

    from linear_moe import lsm

    registered = lsm.names()
    models = given.models or [*registered, cells.SOFTMAX]
    trained = [model for model in models if model != cells.SOFTMAX]
    hybrids = [m for m in HYBRIDS if m in trained] if given.hybrids is None else given.hybrids
    ladder = [m for m in LADDER if m in trained] if given.ladder is None else given.ladder
    for model in (*trained, *hybrids, *ladder):
        lsm.get(model)  # refuses an unknown one
    return cells.plan(models, hybrids, given.state_size, ladder, tuple(range(given.seeds)))


def worker(connection: Connection, setup: Any, limits: Any) -> None:
    """Train the jobs that come until none does; the first failure ends the process: its GPU may be unfit."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import gang
    import torch

    torch.set_num_threads(1)  # more wait for each other in so small a model: seconds a step beside other work
    while (work := connection.recv()) is not None:
        job, record = work
        try:
            found = gang.train_gang(job, setup, record=record, limits=limits, report=say)
        except gang.CaptureFailed as error:
            connection.send(("unrecorded", str(error).splitlines()[0]))
            return
        except Exception:
            connection.send(("failed", traceback.format_exc()))
            return
        connection.send(("done", [cell.as_dict() for cell in found]))
        del found
        gc.collect()


class Pool:
    """Worker processes, a job each at a time."""

    def __init__(self, setup: Any, limits: Any, processes: int) -> None:
        self.setup, self.limits, self.processes = setup, limits, processes
        self.context = multiprocessing.get_context("spawn")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # they import Megatron before their first line runs
        self.busy: dict[Connection, tuple[Any, tuple[Any, bool]]] = {}
        self.idle: list[tuple[Connection, Any]] = []
        self.recorded, self.unrecorded = 0, 0

    def run(self, work: deque[tuple[Any, bool]], store: tables.Store) -> None:
        """Work through the jobs until the deadline, saving what comes."""
        while (work or self.busy) and time.time() < self.limits.deadline + GRACE:
            while work and len(self.busy) < self.processes and time.time() < self.limits.deadline:
                self._give(work.popleft())
            if not self.busy:
                break
            for connection in wait(list(self.busy), timeout=1.0):
                self._take(connection, work, store)
        for connection, process in [*self.idle, *((c, p) for c, (p, _) in self.busy.items())]:
            if connection in self.busy:
                process.terminate()
            else:
                connection.send(None)
            process.join(10)

    def _give(self, item: tuple[Any, bool]) -> None:
        if self.idle:
            connection, process = self.idle.pop()
        else:
            connection, theirs = self.context.Pipe()
            process = self.context.Process(target=worker, args=(theirs, self.setup, self.limits), daemon=True)
            process.start()
            theirs.close()
        job, may_record = item
        # After three that could not be recorded, and while none could, it may not be the mixer: no more attempts.
        connection.send((job, may_record and (self.recorded > 0 or self.unrecorded < 3)))
        self.busy[connection] = (process, item)

    def _take(self, connection: Any, work: deque[tuple[Any, bool]], store: tables.Store) -> None:
        process, (job, _) = self.busy.pop(connection)
        try:
            outcome, value = connection.recv()
        except EOFError:
            process.join(10)
            outcome, value = "failed", f"the process ended with exit code {process.exitcode}"
        if outcome == "done":
            self.idle.append((connection, process))
            self.recorded += any(cell["graph"] for cell in value)
            save(store, value)
            return
        process.join(10)
        if outcome == "unrecorded":
            say(f"{job.model} {job.size}: no graph ({value}); trained again without, several times slower")
            work.appendleft((job, False))
            self.unrecorded += 1
            return
        say(f"{job.model} {job.size}: FAILED\n{value}")
        last = value.strip().splitlines()[-1]
        fingerprint = self.setup.fingerprint()
        store.add(
            [dict(model=job.model, size=job.size, seed=s, setup=fingerprint, error=last) for s in job.seeds]
        )


def save(store: tables.Store, found: list[dict[str, Any]]) -> None:
    """Keep the cells of a job, and say what came out."""
    store.add(found)
    first = found[0]
    scores = " | ".join(" ".join(f"{x:.2f}" for x in cell["accuracy"].values()) for cell in found)
    say(f"{first['model']} {first['size']}: done in {first['seconds']} s, {first['steps']} steps: {scores}")


def train(given: argparse.Namespace, store: tables.Store) -> None:
    """Everything that is not in the store yet, one learning rate and start of the weights after the other."""
    start = time.time()
    jobs, setups = jobs_of(given), setups_of(given)
    import gang

    from linear_moe.training import cpu

    is_gpu = not cpu.needed()
    processes = given.processes
    if processes is None:
        processes = 6 if is_gpu else os.cpu_count() or 1
    limits = gang.Limits(
        deadline=float("inf") if given.minutes is None else start + 60 * given.minutes,
        seconds=given.gang_seconds or float("inf"),
    )
    for setup in setups:
        work = deque((job, is_gpu and not given.no_graph) for job in _left(jobs, setup, setups, given, store))
        total = sum(len(job.seeds) for job in jobs)
        left = sum(len(job.seeds) for job, _ in work)
        say(
            f"learning rate {setup.lr:g}, initial std {setup.init_std:g}: {total} cells, {total - left} of them "
            f"finished before or not needed; {left} to train on {processes} processes"
        )
        if processes:
            Pool(setup, limits, min(processes, max(1, len(work)))).run(work, store)
        while not processes and work and time.time() < limits.deadline:
            job, _ = work.popleft()
            save(store, [cell.as_dict() for cell in gang.train_gang(job, setup, record=False, limits=limits)])
        if work:
            say(f"out of time: {len(work)} models not begun; the same command goes on from here")
            break
    say(f"{(time.time() - start) / 60:.1f} minutes")


def _left(
    jobs: list[Any], setup: Any, setups: list[Any], given: argparse.Namespace, store: tables.Store
) -> list[Any]:
    """What is still to be trained with a setup: not what is there, nor what another setup has all but solved."""
    import cells

    finished = store.finished(setup.fingerprint())
    best = tables.chosen([store.cells(one.fingerprint()) for one in setups])
    left = []
    for job in jobs:
        cells_so_far = [best.get((job.model, job.size, seed), {}) for seed in job.seeds]
        scores = [tables.score(cell) for cell in cells_so_far if cell.get("complete")]
        if len(scores) == len(job.seeds) and sum(scores) / len(scores) >= given.enough:
            continue
        seeds = tuple(seed for seed in job.seeds if (job.model, job.size, seed) not in finished)
        if seeds:
            left.append(cells.Job(job.model, job.size, seeds))
    return left


def say(line: str) -> None:
    """A line of progress."""
    print(time.strftime("%H:%M:%S"), line, flush=True)


def report(given: argparse.Namespace, store: tables.Store) -> None:
    """Write table and plot."""
    setups = setups_of(given)
    if not any(store.cells(setup.fingerprint()) for setup in setups):
        if given.report_only:
            raise ValueError(
                f"{store.path} holds no result of these options\n"
                f"  why: table and plot are of what was trained with the same options\n"
                f"  try: the options of that run, or without --report-only"
            )
        raise ValueError(
            f"no model was trained (--minutes {given.minutes}, --seeds {given.seeds})\n"
            f"  why: all were cut off or not begun, and table and plot are made of results\n"
            f"  try: more --minutes, or fewer --steps and --models; --seeds is at least 1"
        )
    for path in tables.write(store, setups):
        say(f"wrote {path}")


def main(argv: list[str] | None = None) -> int:
    """Train what is missing, then write table and plot; returns the exit code."""
    given = arguments(argv)
    store = tables.Store(given.results)
    with no_messages():
        try:
            if not given.report_only:
                train(given, store)
            report(given, store)
        except ValueError as error:
            print(f"linear_moe: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

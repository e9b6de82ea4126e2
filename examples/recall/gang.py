"""Training the seeds of one cell row together: one stream each, on CUDA every step one launch of a recorded graph.

A step of so small a model is hundreds of kernels of a few microseconds: launched one by one they keep a core busy and
the GPU idle. Recorded once (`torch.cuda.CUDAGraph`) and replayed, they run back to back, and the seeds side by side.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import cells
import mqar
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 50
"""Steps whose data is made, and whose end is waited for, at once."""
WARM_UP = 3
"""Steps before a graph is recorded: libraries and the optimizer allocate what they keep."""
SOLVED = 0.995
"""Accuracy at every number of pairs at which a seed stops early."""
TEST_SEED = 10**6
CURVE_SEED = 10**6 + 1


class CaptureFailed(RuntimeError):
    """A step that cannot be recorded; the process may be unfit for more work on the GPU."""


@dataclass
class Limits:
    """When to stop before the last step."""

    deadline: float = math.inf
    """``time.time()`` at which everything ends."""
    seconds: float = math.inf
    """Of training one gang."""


@dataclass
class Cell:
    """One entry of the table."""

    model: str
    size: str
    seed: int
    setup: str
    """Fingerprint."""
    accuracy: dict[str, float] = field(default_factory=dict)
    """By number of pairs."""
    steps: int = 0
    complete: bool = False
    """Not to be trained again: it has all its steps, is solved, or took as long as a gang may."""
    short_of_time: bool = False
    """Time was up before all steps, and it was not solved."""
    seconds: float = 0.0
    """Of the gang: all its seeds."""
    graph: bool = False
    curve: list[tuple[int, list[float]]] = field(default_factory=list)
    """Accuracy by number of pairs along the training."""
    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Learner:
    """One model, its optimizer and its stream."""

    def __init__(self, job: cells.Job, setup: cells.Setup, seed: int, record: bool) -> None:
        self.seed, self.setup, self.record = seed, setup, record
        self.model, self.facts = cells.build(job, setup, seed)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        device = self.parameters[0].device
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.lr = torch.tensor(setup.lr, device=device)
        decayed = [p for p in self.parameters if p.ndim >= 2]
        others = [p for p in self.parameters if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
            lr=self.lr,
            betas=(0.9, 0.95),
            weight_decay=setup.weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )
        shape = (setup.per_pairs * len(setup.task.pairs), setup.task.length)
        self.tokens_BT = torch.zeros(shape, dtype=torch.int64, device=device)
        self.targets_BT = torch.zeros(shape, dtype=torch.int64, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.steps, self.is_solved = 0, False
        self.curve: list[tuple[int, list[float]]] = []

    def train(self, tokens_BT: Tensor, targets_BT: Tensor) -> None:
        """One step, queued on this learner's stream."""
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            self.lr.fill_(self.setup.lr * _schedule(self.steps, self.setup.steps))
            self.tokens_BT.copy_(tokens_BT)
            self.targets_BT.copy_(targets_BT)
            if self.graph is not None:
                self.graph.replay()
            else:
                self._step()
        self.steps += 1
        if self.record and self.graph is None and self.steps == WARM_UP:
            self._capture()

    def _step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        logits_BTV = logits(self.model, self.tokens_BT)
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), self.targets_BT.flatten(), ignore_index=mqar.IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()

    def _capture(self) -> None:
        """Record the step; recording runs nothing."""
        graph = torch.cuda.CUDAGraph()
        try:
            # A stream of its own also keeps cuBLAS's workspace apart from those of graphs that run beside it.
            # Other threads (NCCL's watchdog) may ask the device anything meanwhile.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self._step()
        except Exception as error:
            raise CaptureFailed(f"{type(error).__name__}: {error}") from error
        self.graph = graph


def train_gang(
    job: cells.Job,
    setup: cells.Setup,
    *,
    record: bool,
    limits: Limits,
    report: Callable[[str], None] = lambda line: None,
) -> list[Cell]:
    """Train the seeds of a job until they are done, solved or out of time, and test each.

    Raises:
        CaptureFailed: with ``record``, a step that cannot be recorded.
    """
    start = time.time()
    logging.getLogger("megatron").setLevel(logging.ERROR)
    learners = [Learner(job, setup, seed, record) for seed in job.seeds]
    device = learners[0].tokens_BT.device
    curve_set = _on(device, *mqar.mixture(setup.task, 32, (CURVE_SEED,)))
    curve_every = max(BLOCK, setup.steps // 6 // BLOCK * BLOCK)
    for first in range(0, setup.steps, BLOCK):
        active = [learner for learner in learners if not learner.is_solved]
        _train_block(active, first, min(BLOCK, setup.steps - first))
        done = min(first + BLOCK, setup.steps)
        if done % curve_every == 0 and done < setup.steps:
            for learner in active:
                scores = accuracy(learner.model, setup.task, *curve_set)
                learner.curve.append((done, scores))
                learner.is_solved = min(scores) >= SOLVED
            lines = " | ".join(" ".join(f"{x:.2f}" for x in learner.curve[-1][1]) for learner in learners)
            report(f"{job.model} {job.size}: step {done}, {time.time() - start:.0f} s, accuracy {lines}")
        is_late = time.time() > limits.deadline or time.time() - start > limits.seconds
        if is_late or all(learner.is_solved for learner in learners):
            break
    is_cut_off = time.time() > limits.deadline
    test_set = _on(device, *mqar.mixture(setup.task, setup.test_per_pairs, (TEST_SEED,)))
    found = []
    for learner in learners:
        scores = accuracy(learner.model, setup.task, *test_set)
        cell = Cell(job.model, job.size, learner.seed, setup.fingerprint(), steps=learner.steps)
        cell.accuracy = {str(pairs): score for pairs, score in zip(setup.task.pairs, scores)}
        cell.short_of_time = not learner.is_solved and learner.steps < setup.steps
        cell.complete = not (cell.short_of_time and is_cut_off)
        cell.graph, cell.curve, cell.facts = learner.graph is not None, learner.curve, learner.facts
        cell.seconds = round(time.time() - start, 2)
        found.append(cell)
    return found


def _train_block(learners: list[Learner], first: int, count: int) -> None:
    """Steps ``first`` to ``first + count`` of all learners, side by side on the device."""
    setup, device = learners[0].setup, learners[0].tokens_BT.device
    blocks = [
        _block(setup.task, setup.per_pairs, learner.seed, first // BLOCK, count, device)
        for learner in learners
    ]
    _wait(device)  # until the data is there: it came on another stream
    for step in range(count):
        for learner, (tokens_SBT, targets_SBT) in zip(learners, blocks):
            learner.train(tokens_SBT[step], targets_SBT[step])
    _wait(device)


def logits(model: torch.nn.Module, tokens_BT: Tensor) -> Tensor:
    """``[B, T, V]`` float32."""
    positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
    return model(tokens_BT, positions_BT, None).float()


@torch.no_grad()
def accuracy(model: torch.nn.Module, task: mqar.Task, tokens: Tensor, targets: Tensor) -> list[float]:
    """Share of queries answered right, by number of pairs; the rows as :func:`mqar.mixture` lays them out."""
    model.eval()
    rows = 64 * len(task.pairs)
    parts = zip(tokens.split(rows), targets.split(rows))
    right, asked = zip(*[_count(model, part_tokens, part_targets) for part_tokens, part_targets in parts])
    model.train()
    right_Pn, asked_Pn = (
        torch.cat(counts).unflatten(0, (-1, len(task.pairs))).sum(0) for counts in (right, asked)
    )
    return [round(share, 4) for share in (right_Pn / asked_Pn).tolist()]


def _count(model: torch.nn.Module, tokens_BT: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Right answers and queries of each row."""
    is_query_BT = targets_BT != mqar.IGNORE
    is_right_BT = (logits(model, tokens_BT).argmax(-1) == targets_BT) & is_query_BT
    return is_right_BT.sum(1).float(), is_query_BT.sum(1).float()


@functools.cache
def _block(
    task: mqar.Task, per_pairs: int, seed: int, block: int, count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The batches of a block of steps, int16: made once in a process, the same for every model."""
    batches = [mqar.mixture(task, per_pairs, (seed, block * BLOCK + step)) for step in range(count)]
    return _on(device, *(np.stack(part) for part in zip(*batches)), dtype=torch.int16)


def _on(device: torch.device, *arrays: np.ndarray, dtype: torch.dtype = torch.int64) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(array).to(dtype).to(device) for array in arrays)


def _schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: 5 % of the steps to rise, then a cosine to a tenth."""
    rise = max(1, steps // 20)
    if step < rise:
        return (step + 1) / rise
    return 0.55 + 0.45 * math.cos(math.pi * (step - rise) / max(1, steps - rise))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()

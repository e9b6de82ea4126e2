"""All rows that a command line asks for: the right ones first, since a wrong kernel has no speed, and others' last."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linear_moe.bench.kernels import measures, report
from linear_moe.bench.kernels.calls import (
    ALL_SHAPES,
    FAMILIES,
    OURS,
    PEER,
    SHAPES,
    SMOKE,
    TORCH,
    Family,
    Operator,
    for_softmax,
    inputs,
    least_bytes,
    ours,
    passes,
    softmax,
)
from linear_moe.bench.kernels.first_calls import compile_ahead, seconds_of
from linear_moe.bench.kernels.peer import arguments, let_it_run, peer, why_not
from linear_moe.bench.kernels.sweep import sweep
from linear_moe.bench.record import Record, Row, say, versions
from linear_moe.kernels import dispatch

FUSED = "triton"
KEYS = ("part", "family", "shape", "dtype", "who")
PACKAGES = ("torch", "triton", "nvidia-cuda-nvcc", "flash-linear-attention")


@dataclass
class Session:
    """What is asked for, the rows so far, and the time left."""

    asked: argparse.Namespace
    record: Record
    device: str
    dtype: torch.dtype
    bandwidth: float
    start: float = field(default_factory=time.monotonic)
    is_bad: bool = False

    @classmethod
    def of(cls, asked: argparse.Namespace, command: str) -> Session:
        """On the GPU where there is one."""
        has_gpu = torch.cuda.is_available()
        device, dtype = ("cuda", torch.bfloat16) if has_gpu else ("cpu", torch.float32)
        record = Record(asked.output / "kernels.json", command)
        return cls(asked, record, device, dtype, measures.bandwidth())

    @property
    def shapes(self) -> list[str]:
        """Names."""
        return self.asked.shapes or list(SMOKE if self.asked.smoke else SHAPES)

    def is_over(self) -> bool:
        """Whether the minutes are."""
        return time.monotonic() - self.start > 60 * self.asked.minutes

    def row(
        self,
        part: str,
        family: str,
        shape: str,
        who: str,
        run: Callable[[], Row],
        dtype: torch.dtype | None = None,
    ) -> None:
        """Measure, or say why not, and keep it; a row that finds no time leaves an older one as it is."""
        about: Row = dict(part=part, family=family, shape=shape, dtype=str(dtype or self.dtype)[6:], who=who)
        say(f"{part}, {report.title(about)} ...")
        found = {"status": "not begun", "error": "the time was over"} if self.is_over() else _outcome(run)
        row = {**about, **found, "device": _device(self.device), "versions": versions(*PACKAGES)}
        say(f"{part}, {report.title(about)}: {report.line(row)}")
        self.is_bad |= who == OURS and row["status"] in ("failed", "wrong")
        if row["status"] != "not begun" or not self.has(about):
            self.record.put(row, KEYS)
            report.write_tables(self.record)

    def has(self, about: Row) -> bool:
        """Whether there is a row of the same call."""
        return any(all(row[key] == about[key] for key in KEYS) for row in self.record.rows)

    def report(self) -> None:
        """Tables and the plot of what there is."""
        for path in report.write(self.record):
            say(f"wrote {path}")

    def compile(self, who: str) -> None:
        """What is measured next, before it is."""
        count = self.asked.processes
        if count and self.device == "cuda" and not self.is_over():
            say(f"compiling the kernels of {who} in {count} processes ...")
            families = _families_of(who, self)
            say(f"compiled in {compile_ahead(who, families, self.shapes, count, self.is_over):.0f} s")


def _outcome(run: Callable[[], Row]) -> Row:
    try:
        return {"status": "ok", **run()}
    except Exception as problem:  # the rest goes on
        traceback.print_exc()
        text = " ".join(str(problem).split())[:300]
        return {"status": "failed", "error": f"{type(problem).__name__}: {text}"}


def _device(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU, interpreted"


def measure(session: Session) -> None:
    """Every part asked for."""
    asked = session.asked
    unfused = set(asked.families) - set(_families_of(OURS, session))
    if unfused:
        say(f"no fused kernel, only looked at for errors: {', '.join(sorted(unfused))}")
    if {"right", "time", "memory"} & set(asked.parts) and OURS in asked.who:
        session.compile(OURS)
    if "right" in asked.parts:
        _errors(session)
    if asked.sweep:
        for shape in session.shapes:
            for family in _families_of(OURS, session):
                session.row("sweep", family, shape, OURS, partial(_swept, session, family, shape))
    for who in (who for who in (OURS, TORCH, PEER) if who in asked.who):
        if who == PEER and (reason := why_not()) is not None:
            say(f"flash-linear-attention is left out: {reason}")
            continue
        if who == PEER and {"time", "memory"} & set(asked.parts):
            session.compile(PEER)
        for shape in session.shapes:
            for part in ("time", "memory"):
                if part in asked.parts and (part == "time" or session.device == "cuda"):
                    _calls(session, part, shape, who)
            report.write(session.record)
        if "cold" in asked.parts and session.device == "cuda" and who != TORCH:
            for family in _families_of(who, session):
                run = partial(seconds_of, family, session.shapes[0], who, asked.cache)
                session.row("cold", family, session.shapes[0], who, run)


def _families_of(who: str, session: Session) -> list[str]:
    """Those that have the operator, fused; on a CPU, where it is to be seen that everything runs, all of ours."""
    asked = session.asked.families
    if who == OURS:
        return [
            name for name in asked if session.device == "cpu" or _backend(FAMILIES[name], session) == FUSED
        ]
    return [name for name in asked if FAMILIES[name].peer]


def _backend(family: Family, session: Session) -> str:
    """What runs its calls."""
    named = inputs(family, SMOKE["tiny"], session.dtype, session.device)
    takes: dict[str, Any] = {**named, "scale": 1.0}
    return dispatch.pick(family.op, named["v"].device, session.dtype, lambda b: b.takes(**takes)).name


def _errors(session: Session) -> None:
    for shape in measures.different_when_small(session.shapes):
        for name in session.asked.families:
            for dtype in [torch.float32] if session.device == "cpu" else [torch.bfloat16, torch.float32]:
                family, size = FAMILIES[name], measures.small(ALL_SHAPES[shape])
                run = partial(measures.errors, family, size, dtype, session.device)
                session.row("right", name, shape, OURS, run, dtype)


def _calls(session: Session, part: str, shape: str, who: str) -> None:
    if who == TORCH:
        if not ALL_SHAPES[shape].documents:
            session.row(part, "softmax", shape, TORCH, partial(_softmax, session, part, shape))
        return
    for name in _families_of(who, session):
        one = _ours if who == OURS else _peer
        session.row(part, name, shape, who, partial(one, session, part, FAMILIES[name], shape))


def _ours(session: Session, part: str, family: Family, shape_name: str) -> Row:
    shape = ALL_SHAPES[shape_name]
    named = inputs(family, shape, session.dtype, session.device)
    found = {"backend": _backend(family, session), **_figures(part, ours(family, shape), named)}
    if part == "time":
        floors = [1e3 * count / session.bandwidth for count in least_bytes(family, shape)]
        found |= {"forward_floor_ms": floors[0], "floor_ms": floors[1], "bandwidth": session.bandwidth}
    return found


def _peer(session: Session, part: str, family: Family, shape_name: str) -> Row:
    shape = ALL_SHAPES[shape_name]
    run = peer(family, shape)
    note = let_it_run(family)
    found = _figures(part, run, arguments(inputs(family, shape, session.dtype, session.device)))
    return found | ({"note": note} if note else {})


def _softmax(session: Session, part: str, shape_name: str) -> Row:
    named = inputs(Family("diag_decay"), ALL_SHAPES[shape_name], session.dtype, session.device)
    return _figures(part, softmax, for_softmax(named))


def _figures(part: str, run: Operator, named: dict[str, Tensor]) -> Row:
    """Milliseconds, or peak memory."""
    forward, both = passes(run, named)
    if part == "memory":
        return {"peak_mib": measures.peak(both, forward)}
    forward_ms, _ = measures.median(forward)
    both_ms, how = measures.median(both)
    return {"forward_ms": forward_ms, "both_ms": both_ms, "how": how}


def _swept(session: Session, name: str, shape_name: str) -> Row:
    """The dozen best changes."""
    family, shape = FAMILIES[name], ALL_SHAPES[shape_name]
    run = passes(ours(family, shape), inputs(family, shape, session.dtype, session.device))[1]
    tried = list(sweep(run, session.is_over, session.asked.smoke))
    timed = sorted((row for row in tried if "ms" in row), key=lambda row: row["ms"] / row["base_ms"])
    return {"tried": len(tried), "best": timed[:12]}

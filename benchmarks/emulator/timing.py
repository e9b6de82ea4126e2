"""How long a multiprocessor of an H100 may take for programs, by what their warps execute: a coarse model.

One of its four schedulers, with its share of the warps of all resident programs: it issues one instruction a cycle, in
order within a warp, after the cycles and scoreboards that the machine code asks for. Pipes have the throughput of
NVIDIA's tables, latencies are those that microbenchmarks report (arXiv 2402.13499). Memory serves each multiprocessor
its share of the bandwidth. What is missing: the caches' conflicts, the other multiprocessors, power, instruction fetch.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from emulator.sass import Step

PROCESSORS, CLOCK, BANDWIDTH = 132, 1.755e9, 3.02e12
L2_BYTES = 32.0
"""A cycle and multiprocessor."""
L1_BYTES = 128 * 1024
LATENCY = {
    "dram": 650,
    "l2": 280,
    "l1": 36,
    "shared": 26,
    "mufu": 22,
    "special": 30,
    "barrier": 24,
    "wgmma": 24,
}
QUEUE = 48
"""Cycles of work that may wait before the pipe of loads and stores, or the tensor core, before a warp is held up."""

ALU = {
    "LOP3",
    "IADD3",
    "VIADD",
    "SHF",
    "SEL",
    "ISETP",
    "LEA",
    "PRMT",
    "FSEL",
    "FSETP",
    "VIMNMX",
    "VIADDMNMX",
    "SGXT",
}
ALU |= {"FMNMX", "PLOP3", "P2R", "R2P", "IABS", "F2FP", "IMNMX"}
HALF_FMA = {"IMAD", "IDP"}
FMA = {"FADD", "FMUL", "FFMA", "HFMA2", "HADD2", "HMUL2"}
MUFU = {"MUFU", "I2F", "F2I", "F2F", "I2I", "POPC", "FLO", "BREV"}


@dataclass
class Cost:
    """What an instruction takes, for one warp."""

    pipe: str = "issue"
    cycles: float = 0.0
    """Of that pipe, of the scheduler's quarter of it."""
    kind: str = ""
    latency: float = 0.0
    sectors: int = 0
    """Of 32 bytes, beyond the first cache."""
    shared: float = 0.0
    """Cycles of shared memory, of the multiprocessor."""


@dataclass
class Trace:
    """One program's warp: its steps, with costs, and what the program touches."""

    steps: list[tuple[Any, Cost]]
    read: dict[int, int] = field(default_factory=dict)
    """Bytes of each tensor (its number), once each; ``written``: the same."""
    written: dict[int, int] = field(default_factory=dict)
    asked: int = 0
    """Bytes of all warps beyond the first cache."""

    def busy(self, warps: int) -> dict[str, float]:
        """Cycles of all multiprocessors' units for so many warps, of what they can give at best."""
        total = dict.fromkeys(("alu", "fma", "mufu", "tensor", "shared"), 0.0)
        for _, cost in self.steps:
            if cost.pipe in total:
                total[cost.pipe] += cost.cycles
            total["shared"] += cost.shared if cost.kind == "wgmma" else 4 * cost.shared
        total["issue"] = float(len(self.steps))
        return {name: cycles * warps / 4 / PROCESSORS for name, cycles in total.items()}


class Coster:
    """Costs of the steps of one program."""

    def __init__(self, starts: list[int], num_threads: int) -> None:
        self._starts = np.array(starts or [0])
        self.passes = self.least_passes = 0.0
        """Over the banks of shared memory, and if there were no conflicts."""
        self.warps = max(1, num_threads // 32)
        self._conflicts: dict[Any, float] = {}
        self._recent: dict[int, int] = {}
        self._clock = 0
        self._touched: tuple[set[int], set[int]] = set(), set()

    def trace(self, steps: list[Step]) -> Trace:
        """Of all steps."""
        found = Trace([])
        for step in steps:
            cost = self._cost(step) if step.is_on else Cost()
            found.asked += 32 * cost.sectors
            cost.sectors = -(-cost.sectors // self.warps)
            found.steps.append((step.instruction, cost))
        for sectors, target in zip(self._touched, (found.read, found.written)):
            place = (
                np.searchsorted(self._starts, np.array(sorted(sectors), np.int64) * 32 + 31, side="right") - 1
            )
            for number, count in zip(*np.unique(place, return_counts=True)):
                target[int(number)] = 32 * int(count)
        return found

    def _cost(self, step: Step) -> Cost:
        words = step.instruction.words
        name = words[0]
        if name in ALU:
            return Cost("alu", 2)
        if name in HALF_FMA:
            return Cost("fma", 2)
        if name in FMA:
            return Cost("fma", 1)
        if name in MUFU:
            return Cost("mufu", 8, "variable", LATENCY["mufu"])
        if name == "HGMMA":
            return self._wgmma(step)
        if name == "HMMA":
            flops = {"16816": 2048, "1688": 1024}.get(words[1], 2048) * (2 if "TF32" in words else 1)
            return Cost("tensor", flops / 512 / 0.62, "", 0)
        if name in ("LDS", "STS", "LDSM", "STSM", "LDG", "STG", "LDGSTS", "SHFL"):
            return self._memory(step)
        if name in ("LDL", "STL"):
            waves = {"128": 4, "64": 2}.get(words[-1], 1)
            return Cost("lsu", 4 * waves, "variable", LATENCY["l1"], 0, waves)
        if name.startswith("U") or name in ("R2UR", "S2UR"):
            return Cost("uniform", 2, "variable", LATENCY["special"] if name in ("S2UR", "R2UR") else 12)
        return Cost("issue", 0, "variable", LATENCY["special"])

    @staticmethod
    def _wgmma(step: Step) -> Cost:
        rows, columns, depth = (int(x) for x in step.instruction.words[1].split("x"))
        from_shared = step.instruction.operands[1].startswith("gdesc")
        full = 2048 if "TF32" not in step.instruction.words else 1024
        shared = columns / 4 + (16 if from_shared else 0)
        cycles = max(rows * columns * depth / full, shared)
        return Cost("tensor", cycles, "wgmma", LATENCY["wgmma"], 0, shared)

    def _memory(self, step: Step) -> Cost:
        words = step.instruction.words
        name = words[0]
        if name == "SHFL":
            return Cost("lsu", 4, "variable", LATENCY["shared"], 0, 1)
        size = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1}.get(words[-1], 4)
        places, active = step.addresses if step.addresses else ([None], None)
        num_threads = 32 * self.warps
        mask = (
            np.ones(num_threads, bool)
            if active is None
            else np.broadcast_to(np.asarray(active, bool), (num_threads,))
        )
        waves = 0.0
        if name != "LDG" and name != "STG":
            is_matrix = name in ("LDSM", "STSM")
            size_here = 16 if is_matrix else size
            lanes = (8 * int(words[-1]) if words[-1] in ("2", "4") else 8) if is_matrix else 32
            waves += self._wavefronts(places[0], size_here, lanes, mask)
            self.passes += waves
            self.least_passes += lanes * size_here / 128
        if name in ("LDS", "STS", "LDSM", "STSM"):
            return Cost("lsu", 4 * waves, "variable", LATENCY["shared"], 0, waves)
        address = places[-1]
        if address is None:
            lines, missed = size * 32 / 128, size
        else:
            lines, missed = self._global(
                np.broadcast_to(np.asarray(address), (num_threads,))[mask], size, name
            )
        kind = {"LDG": "load", "STG": "store", "LDGSTS": "copy"}[name]
        waves += lines if name != "LDGSTS" else 0
        return Cost("lsu", 4 * waves, kind, 0, missed, waves)

    def _wavefronts(self, address: Any, size: int, lanes: int, mask: Any) -> float:
        """Passes over the banks, for a warp (the mean of all)."""
        if address is None:
            return lanes * size / 128
        address = np.broadcast_to(np.asarray(address, np.int64), mask.shape)
        base = int(address[0]) & ~127
        key = (address - base).tobytes(), size, lanes, mask.tobytes()
        if key not in self._conflicts:
            group = max(1, min(lanes, 128 // size))
            by_warp, on = (address - base).reshape(-1, 32)[:, :lanes], mask.reshape(-1, 32)[:, :lanes]
            total = 0
            for warp, is_on in zip(by_warp, on):
                for first in range(0, lanes, group):
                    chosen = warp[first : first + group][is_on[first : first + group]]
                    if chosen.size:
                        spans = np.unique(chosen[:, None] // 4 + np.arange(max(1, size // 4)))
                        total += np.bincount(spans % 32).max()
            self._conflicts[key] = total / len(by_warp)
        return self._conflicts[key]

    def _global(self, address: Any, size: int, name: str) -> tuple[float, int]:
        """Lines of a warp, and sectors of all warps that are not in the first cache."""
        if not address.size:
            return 0.0, 0
        sectors = np.unique(address[:, None] // 32 + np.arange(max(1, size // 32)))
        lines = np.unique(address // 128).size
        self._touched[name == "STG"].update(sectors.tolist())
        if name != "LDG":
            return lines / self.warps, sectors.size
        self._clock += 32 * sectors.size
        missed = [x for x in sectors.tolist() if self._clock - self._recent.get(x, -L1_BYTES) > L1_BYTES]
        self._recent.update(dict.fromkeys(sectors.tolist(), self._clock))
        return max(lines, sectors.size / 4) / self.warps, len(missed)


@dataclass
class _Warp:
    program: int
    at: int = 0
    since: float = 0.0
    boards: list[float] = field(default_factory=lambda: [0.0] * 6)
    copies: float = 0.0
    groups: deque[float] = field(default_factory=deque)
    products: deque[float] = field(default_factory=deque)


class Scheduler:
    """A quarter of a multiprocessor."""

    def __init__(self, trace: Trace, warps: int, cycles_per_sector: float, far: float) -> None:
        self._steps, self._warps = trace.steps, max(1, warps // 4)
        self._per_sector, self._far = cycles_per_sector, far
        self.lines: dict[str, tuple[float, float]] = {}

    def run(self, resident: int, programs: int) -> float:
        """Cycles for so many programs, so many at a time, until the last has ended."""
        pipes = dict.fromkeys(("issue", "alu", "fma", "mufu", "lsu", "tensor", "uniform", "memory"), 0.0)
        left = programs
        events: list[tuple[float, int, _Warp]] = []
        waiting: dict[int, list[tuple[float, int, _Warp]]] = {}
        running: dict[int, int] = {}
        number = last = 0
        started = 0

        def start(now: float) -> None:
            nonlocal number, started, left
            left -= 1
            started += 1
            running[started] = self._warps
            for _ in range(self._warps):
                number += 1
                heapq.heappush(events, (now, number, _Warp(started, since=now)))

        for n in range(min(resident, programs)):
            start(60.0 * n)
        while events:
            now, order, warp = heapq.heappop(events)
            if warp.at == len(self._steps):
                last = max(last, now)
                running[warp.program] -= 1
                if running[warp.program] == 0 and left > 0:
                    start(now)
                continue
            one, cost = self._steps[warp.at]
            ready = self._ready(now, one, cost, warp, pipes)
            if ready > now:
                heapq.heappush(events, (ready, order, warp))
                continue
            after = self._issue(now, one, cost, warp, pipes)
            waited, worked = self.lines.get(one.where, (0.0, 0.0))
            self.lines[one.where] = waited + now - warp.since, worked + after - now
            warp.at, warp.since = warp.at + 1, after
            if one.words[0] == "BAR":
                held = waiting.setdefault(warp.program, [])
                held.append((after, order, warp))
                if len(held) < running[warp.program]:
                    continue
                after = max(x[0] for x in held) + LATENCY["barrier"]
                for arrived, other, that in held:
                    waited, worked = self.lines[one.where]
                    self.lines[one.where] = waited + after - arrived, worked
                    that.since = after
                    heapq.heappush(events, (after, other, that))
                held.clear()
                continue
            heapq.heappush(events, (after, order, warp))
        return float(last)

    @staticmethod
    def _ready(now: float, one: Any, cost: Cost, warp: _Warp, pipes: dict[str, float]) -> float:
        ready = max(now, pipes["issue"])
        waits, n = one.waits, 0
        while waits:
            if waits & 1:
                ready = max(ready, warp.boards[n])
            waits >>= 1
            n += 1
        name = one.words[0]
        if name == "DEPBAR" and warp.groups:
            left = int(one.operands[1], 16)
            while len(warp.groups) > left:
                ready = max(ready, warp.groups.popleft())
        elif name == "WARPGROUP" and one.words[1] == "DEPBAR":
            left = int(one.operands[1], 16)
            while len(warp.products) > left:
                ready = max(ready, warp.products.popleft())
        if cost.cycles:
            slack = QUEUE if cost.pipe in ("lsu", "tensor") else 0
            ready = max(ready, pipes[cost.pipe] - slack)
        return ready

    def _issue(self, now: float, one: Any, cost: Cost, warp: _Warp, pipes: dict[str, float]) -> float:
        pipes["issue"] = now + 1
        done = now + cost.latency
        if cost.cycles:
            pipes[cost.pipe] = max(pipes[cost.pipe], now) + cost.cycles
            done = pipes[cost.pipe] + cost.latency
        if cost.kind == "wgmma":
            pipes["lsu"] = max(pipes["lsu"], now) + cost.shared
            if one.operands[-1] == "gsb0":
                warp.products.append(done)
        elif cost.sectors:
            pipes["memory"] = max(pipes["memory"], now) + cost.sectors * self._per_sector
            arrives = pipes["memory"] + self._far
            if cost.kind == "copy":
                warp.copies = max(warp.copies, arrives)
            elif cost.kind == "load":
                done = arrives
        elif cost.kind in ("load", "copy"):
            done += LATENCY["l1"]
        if one.words[0] == "LDGDEPBAR":
            warp.groups.append(warp.copies)
        if one.sets < 6:
            warp.boards[one.sets] = max(warp.boards[one.sets], done)
        if one.reads < 6:
            read = (pipes[cost.pipe] if cost.cycles else now) + 12
            warp.boards[one.reads] = max(warp.boards[one.reads], read)
        return now + max(1, one.stall)


class Model:
    """Cycles of a grid of ``count`` programs; ``fraction``: of what is asked of L2, how much comes from memory."""

    def __init__(
        self, trace: Trace, warps: int, count: int, resident: int, fraction: float, most_events: int
    ) -> None:
        self._trace, self._warps, self._fraction, self._most = trace, warps, fraction, most_events
        spread = min(1.0, warps / 4)  # fewer warps than schedulers: each has some of the programs
        self._waves = -(-count // (PROCESSORS * resident))
        self._share = BANDWIDTH / CLOCK / min(count, PROCESSORS)
        self._each = max(1, round(-(-count // PROCESSORS) * spread))
        self._slots = max(1, min(int(resident * spread), self._each))
        self.lines: dict[str, tuple[float, float]] = {}

    @staticmethod
    def ms_of(cycles: float) -> float:
        """At the clock."""
        return cycles / CLOCK * 1e3

    def alone(self) -> float:
        """As if each program had a multiprocessor, and memory, to itself."""
        return self._run(1, 1, 1 / 64) * self._waves

    def full(self) -> float:
        """Several rounds of programs, as many at a time as fit; scaled to the grid."""
        of_program = len(self._trace.steps) * max(1, self._warps // 4)
        rounds = min(self._each, 4 * self._slots, self._most // of_program)
        programs = max(self._slots, rounds)
        per_byte = max(self._fraction / min(self._share, 64), 1 / L2_BYTES)
        return self._run(self._slots, programs, per_byte) * self._each / programs

    def _run(self, slots: int, programs: int, per_byte: float) -> float:
        steps = self._trace.steps
        kept = steps[: max(1000, self._most // (slots * max(1, self._warps // 4)))]
        far = LATENCY["l2"] + self._fraction * (LATENCY["dram"] - LATENCY["l2"])
        scheduler = Scheduler(Trace(kept), self._warps, 4 * 32 * per_byte, far)
        cycles = scheduler.run(slots, programs)
        self.lines = scheduler.lines
        return cycles * len(steps) / len(kept)

"""Loads and stores of sm_90's machine code: where they go, and which registers are unknown afterwards."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from emulator.sass import Instruction, Threads

Value = Any
MEMORY = ("LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS")


def access(threads: Threads, one: Instruction) -> Callable[[Value], Any]:
    """Addresses of the threads that are on (to global memory, of LDGSTS both); what is loaded is unknown."""
    is_load = one.words[0] in ("LDG", "LDS", "LDSM")
    places = [x for x in one.operands if "[" in x]
    readers = [threads.address_reader(x) for x in places]
    last = one.operands[-1]
    guard_of_copy = threads.reader(last) if re.fullmatch(r"!?U?P[0-6T]", last) else (lambda: 1)
    targets = _registers(one, one.operands[0]) if is_load else []

    def do(guard: Value) -> Any:
        inner = guard_of_copy()
        both = None if guard is None or inner is None else np.asarray(guard) * np.asarray(inner)
        found = [read() for read in readers]
        for target in targets:
            threads.set(target, None)
        return found, both

    return do


def spilled(threads: Threads, one: Instruction) -> Callable[[Value], Any]:
    """Registers that wait in memory, where the address is a number."""
    is_load = one.words[0] == "LDL"
    read = threads.address_reader(one.operands[is_load])
    registers = _registers(one, one.operands[not is_load])
    readers = [threads.reader(x) for x in registers]

    def do(guard: Value) -> None:
        place = read()
        for n, register in enumerate(registers):
            at = f"spilled {place} {n}" if place is None else f"spilled {place + 4 * n}"
            if is_load:
                threads.set(register, threads.values.get(at), guard)
            else:
                threads.set(at, readers[n](), guard)

    return do


def _registers(one: Instruction, first: str) -> list[str]:
    """All that a load fills, or a store empties."""
    found = re.fullmatch(r"R(\d+)", first)
    count = {"64": 2, "128": 4, "4": 4, "2": 2}.get(one.words[-1], 1)
    return [f"R{int(found[1]) + n}" for n in range(count)] if found else [first] * count

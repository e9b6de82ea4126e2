"""The machine code of a kernel: what a program of a grid executes, instruction by instruction, and where it reads.

nvdisasm prints the instructions, with the bits that tell the scheduler how long to wait after and for what before each
one. Addresses, trip counts and predicates are computed for all threads of a program, from its arguments, in integers;
what comes out of memory or floating point is unknown, and nothing here depends on it but the exit of rare branches.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import triton

from emulator.integers import MASK, Value, action, signed

PARAMETERS = 0x210
"""Where they start in the constants of sm_90."""


@dataclass
class Instruction:
    """One, as printed, and what its 128 bits say to the scheduler."""

    name: str
    operands: list[str]
    guard: str
    stall: int
    sets: int
    """Scoreboard that it leaves when its result is there, or 7; ``reads``: when its operands were read."""
    reads: int
    waits: int
    """Bits of scoreboards."""
    target: int = -1
    """Of a branch."""
    words: list[str] = field(default_factory=list)
    where: str = ""
    """Line of the source."""


@dataclass
class Step:
    """An instruction that a warp executed; for those that go to memory what it asked for."""

    instruction: Instruction
    is_on: bool = True
    """Whether any thread's guard held."""
    addresses: Any = None
    """Of all threads, or None."""


def disassemble(cubin: bytes) -> list[Instruction]:
    """The one kernel of a cubin."""
    tool = Path(triton.__file__).with_name("backends") / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-c", "-hex", "-g", file.name], capture_output=True, text=True, check=True
        ).stdout
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    where = ""
    for line in text.split("\n"):
        if source := re.match(r'\s+//## File ".*?([^/"]+)", line (\d+)', line):
            where = f"{source[1]}:{source[2]}"
        elif label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif code := re.match(
            r"\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?(\S+?)(?:\s+([^;]*?))?\s*;", line
        ):
            operands = [x.strip().removesuffix(".reuse") for x in (code[3] or "").split(",")]
            found.append(Instruction(code[2], operands, (code[1] or "").strip(), 1, 7, 7, 0))
            found[-1].words, found[-1].where = code[2].split("."), where
        elif high := re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/", line):
            bits = int(high[1], 16) >> 41
            last = found[-1]
            last.stall, last.sets, last.reads, last.waits = (
                bits & 15,
                bits >> 5 & 7,
                bits >> 8 & 7,
                bits >> 11 & 63,
            )
    for one in found:
        if label := re.search(r"`\((\.L_x_\d+)\)", one.operands[-1]):
            one.target = labels[label[1]]
    return found


class Threads:
    """Registers of all threads of one program, as far as they are integers that can be known."""

    def __init__(
        self, arguments: bytes, num_threads: int, place: tuple[int, ...], grid: tuple[int, ...]
    ) -> None:
        self._constants = bytearray(PARAMETERS) + bytearray(arguments) + bytearray(64)
        for n, size in enumerate((num_threads, 1, 1, *grid)):
            self._constants[4 * n : 4 * n + 4] = int(size).to_bytes(4, "little")
        thread = np.arange(num_threads, dtype=np.int64)
        self.special: dict[str, Value] = {f"SR_CTAID.{axis}": n for axis, n in zip("XYZ", place)}
        self.special |= {"SR_TID.X": thread, "SR_LANEID": thread % 32}
        self.values: dict[str, Value] = {}
        self.guesses = 0
        """Branches on something unknown."""

    def run(self, code: list[Instruction], limit: int, *, leaves: bool = True) -> list[Step]:
        """From start to exit, or ``limit`` instructions; ``leaves``: by exits that depend on something unknown."""
        actions = [action(self, one) for one in code]
        guards = [self.reader(one.guard[1:] or "PT") for one in code]
        steps: list[Step] = []
        at = 0
        while len(steps) < limit:
            one, guard, do = code[at], guards[at](), actions[at]
            is_on = guard is None or bool(np.any(guard))
            steps.append(Step(one, is_on))
            at += 1
            if not is_on:
                continue
            if one.words[0] == "EXIT" and (leaves if guard is None else np.all(guard)):
                break
            if one.target >= 0 and one.words[0] == "BRA":
                if one.target == at - 1:
                    break
                self.guesses += guard is None
                if guard is not None and (one.target < at or np.all(guard)):
                    at = one.target
            elif do is not None:
                steps[-1].addresses = do(guard)
        return steps

    def reader(self, name: str) -> Callable[[], Value]:
        """Reads an operand."""
        if name[0] in "-~!|":
            inside, mark = self.reader(name.strip("-~!|")), name[0]

            def changed() -> Value:
                x = inside()
                if x is None or mark == "|":
                    return None
                return 1 - x if mark == "!" else (-x if mark == "-" else ~x) & MASK

            return changed if not re.match(r"-0x", name) else lambda: -int(name[3:], 16) & MASK
        constant = {"RZ": 0, "URZ": 0, "SRZ": 0, "PT": 1, "UPT": 1}.get(name)
        if re.match(r"0x[0-9a-f]+$", name):
            constant = int(name, 16)
        if found := re.match(r"c\[0x0\]\[0x([0-9a-f]+)\]", name):
            place = int(found[1], 16)
            constant = int.from_bytes(self._constants[place : place + 4], "little")
        if constant is not None:
            return lambda: constant
        values = self.values
        return lambda: values.get(name)

    def wide_reader(self, name: str) -> Callable[[], Value]:
        """Reads two registers."""
        low, high = self.reader(name), self.reader(after(name))

        def both() -> Value:
            x, y = low(), high()
            if x is None or y is None:
                return None
            total = x | y << 32
            return signed(total, 64) if isinstance(total, int) else total

        return both

    def set(self, name: str, value: Value, guard: Value = 1) -> None:
        """Where the guard holds."""
        if guard is None:
            value = None
        elif value is not None and not np.all(guard):
            old = self.values.get(name)
            value = None if old is None else np.where(np.asarray(guard, bool), value, old)
        if name not in ("RZ", "URZ", "PT", "UPT"):
            self.values[name] = value

    def set_wide(self, name: str, value: Value, guard: Value = 1) -> None:
        """Two registers."""
        self.set(name, None if value is None else value & MASK, guard)
        self.set(after(name), None if value is None else value >> 32 & MASK, guard)

    def address_reader(self, operand: str) -> Callable[[], Value]:
        """Of ``[R1+UR2+0x10]`` or ``desc[UR4][R2.64+0x10]``."""
        inside = operand[operand.rindex("[") + 1 : operand.rindex("]")]
        parts, number = [], 0
        for part in inside.split("+"):
            if found := re.match(r"(-?)0x([0-9a-f]+)$", part.strip()):
                number += int(found[2], 16) * (-1 if found[1] else 1)
            elif part.endswith(".64"):
                parts.append(self.wide_reader(part[:-3]))
            else:
                parts.append(self.reader(part.strip().removesuffix(".X4").removesuffix(".U32")))

        def total() -> Value:
            found = [part() for part in parts]
            return None if any(x is None for x in found) else sum(found, number)

        return total


def after(name: str) -> str:
    """The next register, or word of the constants."""
    if found := re.fullmatch(r"(-?~?U?R)(\d+)", name):
        return f"{found[1]}{int(found[2]) + 1}"
    if found := re.fullmatch(r"c\[0x0\]\[0x([0-9a-f]+)\]", name):
        return f"c[0x0][{int(found[1], 16) + 4:#x}]"
    return "RZ"

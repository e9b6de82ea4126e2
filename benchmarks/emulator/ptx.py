"""PTX to a Python function of one program."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from emulator import numbers
from emulator.instructions import Writer
from emulator.numbers import UNDEFINED


@dataclass(frozen=True)
class Program:
    """``run(machine, parameters)``; parameters are bits by name."""

    run: Callable[[Any, dict[str, Any]], None]
    num_threads: int
    parameters: list[tuple[str, str]]
    """Type and name."""


def translate(ptx: str) -> Program:
    """The one kernel of a module."""
    entry = ptx[ptx.index(".entry") :]
    head, body = entry.split("{", 1)
    found = re.search(r"\.reqntid (\d+)", head)
    assert found is not None
    blocks, labels = _blocks(body)
    writer = Writer(labels)
    lines = ["  while True:"]
    for number, block in enumerate(blocks):
        lines.append(f"    if pc == {number}:")
        for text, where in block:
            lines += ["      " + line for line in writer.lines(text, where)]
        lines.append(f"      pc = {number + 1}")
    lines.append(f"    if pc == {len(blocks)}: return")
    registers = [f"  {name} = {_undefined(name)!r}" for name in sorted(writer.registers)]
    source = "\n".join(["def run(m, parameters):", "  pc = 0", *registers, *lines])
    names: dict[str, Any] = {**vars(numbers), "np": np}
    exec(compile(source, "<ptx>", "exec"), names)
    parameters = re.findall(r"\.param \.(\w+)(?: \.ptr[^,\n]*?)? (\w+)[,\n]", head)
    return Program(names["run"], int(found[1]), parameters)


def _undefined(name: str) -> Any:
    kind = re.match(r"v_([a-z]*)", name)
    assert kind is not None
    value = UNDEFINED.get(kind[1], UNDEFINED["r"])
    return value if isinstance(value, bool) else int(value)


def _blocks(body: str) -> tuple[list[list[tuple[str, str]]], dict[str, int]]:
    """Instructions with the line of the kernel that they are of, in runs that are entered at their start only."""
    blocks: list[list[tuple[str, str]]] = [[]]
    labels: dict[str, int] = {}
    where = ""
    for line in body.split("\n"):
        line = line.strip()
        if line.startswith(".loc"):
            found = re.search(r"// (\S+)", line)
            where = found[1] if found else ""
            continue
        if line.startswith((".section", ".file")):
            break
        for text in line.split("//")[0].split(";"):
            text = text.strip()
            while label := re.match(r"(\$?[\w$]+):\s*", text):
                labels[label[1]] = len(blocks)
                blocks.append([])
                text = text[label.end() :]
            text = re.sub(r"^\{\s*(?![\s%])|^\}$", "", text).strip()
            if not text or text.startswith("."):
                continue
            blocks[-1].append((text, where))
            if re.match(r"(@\S+\s+)?(bra|ret)\b", text):
                blocks.append([])
    return blocks, labels

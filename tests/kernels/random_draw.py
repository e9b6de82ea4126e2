"""Which number is which call; run as a program, what Triton's interpreter gets wrong: ``python random_draw.py 0 7 ..``.

It prints a JSON line for each number: the number, the call's name, what is wrong, seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    os.environ.update(TRITON_INTERPRET="1", LINEAR_MOE_KERNELS="triton")
    sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from random_calls import FULL, PER_GEOMETRY, SMALL, Call, Dice, Size, judge
from random_scans import KINDS, LOW_RANK, SEGMENTS, scan
from random_small import OPERATIONS, rms_norm, rotate_heads
from scan_cases import poison_empty

from linear_moe import kernels

Draw = Callable[[torch.dtype, Size, Dice], Call]
HALVES = torch.bfloat16, torch.float32, torch.bfloat16, torch.float16


def _plan() -> dict[str, tuple[Draw, torch.dtype]]:
    """Of each geometry: every kind of every recurrence in four, of a segment in one, other operators in three.

    What came later is at the end, so that numbers stay the calls that they were.
    """
    found: dict[str, tuple[Draw, torch.dtype]] = {}

    def add(operation: Draw, dtype: torch.dtype, *words: str) -> None:
        name = "-".join([str(len(found)), *words, str(dtype).removeprefix("torch.")])
        found[name] = operation, dtype

    for dtype in HALVES:
        for op, kinds in KINDS.items():
            for kind in kinds:
                add(partial(scan, op, kind), dtype, op, kind)
    for i, (op, family) in enumerate(SEGMENTS.items()):
        for j, kind in enumerate(kind for kind in KINDS.get(family, ()) if kind != "bonus"):
            add(partial(scan, op, kind), HALVES[(i + j) % 4], op, kind)
    for dtype in HALVES[1:]:
        for operation in OPERATIONS:
            add(operation, dtype, operation.__name__)
    for dtype, kind in zip((*HALVES, *HALVES[1:]), (*["vector"] * 4, "none", "head", "scalar")):
        add(partial(scan, LOW_RANK, kind), dtype, LOW_RANK, kind)
    for dtype, kind in zip(HALVES[2:], ("vector", "scalar")):
        add(partial(scan, f"{LOW_RANK}_segment", kind), dtype, f"{LOW_RANK}_segment", kind)
    for dtype in HALVES[1:]:
        add(rotate_heads, dtype, "rotate_heads")
    for dtype in HALVES[1:]:
        add(rms_norm, dtype, "rms_norm")
    return found


PLAN = _plan()
NAMES = [f"{name}-{i}" for name in PLAN for i in range(PER_GEOMETRY)]
"""Of numbers."""


def draw(number: int, size: Size = FULL, has_bfloat16: bool = True) -> Call:
    """The call of a number; numbers without a name are other calls of the same operators."""
    operation, dtype = list(PLAN.values())[number // PER_GEOMETRY % len(PLAN)]
    if dtype == torch.bfloat16 and not has_bfloat16:
        call = operation(torch.float16, size, Dice.of(number))
        call.is_bfloat16 = True
        return call
    return operation(dtype, size, Dice.of(number))


def main() -> None:
    """In the interpreter, which is wrong in bfloat16, with as many processors as make segments."""
    parser = argparse.ArgumentParser()
    parser.add_argument("numbers", nargs="+", type=int)
    parser.add_argument("--tokens", type=int, default=SMALL.tokens)
    parser.add_argument("--dim", type=int, default=SMALL.dim)
    asked = parser.parse_args()
    size = Size(asked.tokens, asked.dim, SMALL.heads, SMALL.batch, SMALL.documents)
    import pytest
    import quick_interpreter

    from linear_moe.kernels.triton import configs, delta_configs

    quick_interpreter.install()
    torch.set_num_threads(1)
    poison_empty(pytest.MonkeyPatch())
    configs.MIN_CHUNKS = delta_configs.MIN_CHUNKS = 1
    for number in asked.numbers:
        start, call = time.perf_counter(), draw(number, size, has_bfloat16=False)
        processors = (4, 16, 64)[number % 3]
        with mock.patch.object(configs, "num_processors", partial(_constant, processors)):
            try:
                wrong = judge(call, kernels, "cpu")
            except Exception:  # the other numbers go on
                wrong = {"raised": traceback.format_exc()[-1500:]}
        print(json.dumps([number, str(call), wrong, round(time.perf_counter() - start, 1)]), flush=True)


def _constant(value: int, device: torch.device) -> int:
    return value


if __name__ == "__main__":
    main()

"""Whether a trial runs the machine code of the call that it stands for, without compiling: a process of its own.

``python trial_launches.py`` prints a JSON line for each operation and shape: which variants of kernels the trial would
compile that the call does not need, and which of the call's it leaves out.
"""

from __future__ import annotations

import inspect
import json
from typing import Any

from packed_launches import KINDS, Variants, arguments, run, variants  # isort: skip  # makes Triton compile

from linear_moe.kernels import dispatch
from linear_moe.kernels.triton import trial

SHAPES = {
    "16 rows": (16, 2048, 8),
    "a long row": (1, 16384, 2),
    "documents": (1, 16384, 2),
    "odd": (2, 4096, 3),
}
WIDTHS = {"odd": 72}


def tried(op: str, given: dict[str, Any]) -> None:
    """The trial, whose results mean nothing here."""
    fused, in_torch, _ = dispatch.BACKENDS[op]
    trial._difference(fused.run, in_torch.run, inspect.signature(in_torch.run).bind(**given))


def without(some: Variants, others: Variants) -> dict[str, int]:
    """How many of each kernel only the first one has."""
    left = {name: len(found - others.get(name, set())) for name, found in some.items()}
    return {name: count for name, count in left.items() if count}


def main() -> None:
    """Every recurrence and segment."""
    for words, shape in SHAPES.items():
        for op, kinds in KINDS.items():
            for kind in kinds:
                boundaries = (0, 300, shape[1]) if words == "documents" else ()
                given = arguments(op, kind, shape, WIDTHS.get(words, 128), boundaries)
                real = variants(lambda: run(op, given))  # noqa: B023
                trials = variants(lambda: tried(op, given))  # noqa: B023
                print(
                    json.dumps([f"{op} {kind} {words}", without(trials, real), without(real, trials)]),
                    flush=True,
                )


if __name__ == "__main__":
    main()

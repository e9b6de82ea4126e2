"""Whether a trial runs the machine code of the call that it stands for, without compiling: a process of its own.

``python trial_launches.py`` prints a JSON line for each operation and shape: which variants of kernels the trial would
compile that the call does not need, and which of the call's it leaves out.
"""

from __future__ import annotations

import inspect
import json
from typing import Any

from packed_launches import KINDS, Variants, both_ways, token, variants  # isort: skip  # makes Triton compile

import torch
from torch import Tensor

from linear_moe import kernels
from linear_moe.kernels import dispatch
from linear_moe.kernels.triton import trial

SHAPES = {
    "16 rows": (16, 2048, 8),
    "a long row": (1, 16384, 2),
    "documents": (1, 16384, 2),
    "odd": (2, 4096, 3),
}
WIDTHS = {"odd": 72}


def arguments(
    op: str, kind: str, shape: tuple[int, int, int], width: int, is_packed: bool
) -> dict[str, Tensor]:
    """Of a call."""
    found = {name: token(*shape, width) for name in ("k", "v")}
    decays = {"head": shape[2:], "scalar": shape, "vector": (*shape, width), "bonus": (*shape, width)}
    if kind in decays:
        found["log_decay"] = token(*decays[kind], dtype=torch.float32)
    if kind == "values":
        found["log_decay_v"] = token(*shape, width, dtype=torch.float32)
    if kind == "bonus":
        found["bonus"] = token(shape[2], width, dtype=torch.float32)
    if op.startswith("delta_rule"):
        found["beta"] = token(*shape)
    if op.startswith("dplr"):
        found |= {name: token(*shape, width) for name in ("a", "b")}
    if is_packed:
        found["cu_seqlens"] = torch.tensor([0, 300, shape[1]], dtype=torch.int32)
    return found if op.endswith("_segment") else found | {"q": token(*shape, width)}


def call(op: str, given: dict[str, Any]) -> None:
    """Forward and backward."""
    found = getattr(kernels, op)(**given)
    outputs = [found.state, found.log_decay, found.decay] if op.endswith("_segment") else found
    both_ways(outputs, [x for x in given.values() if x.requires_grad])


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
                given = arguments(op, kind, shape, WIDTHS.get(words, 128), words == "documents")
                real = variants(lambda: call(op, given))  # noqa: B023
                trials = variants(lambda: tried(op, given))  # noqa: B023
                print(
                    json.dumps([f"{op} {kind} {words}", without(trials, real), without(real, trials)]),
                    flush=True,
                )


if __name__ == "__main__":
    main()

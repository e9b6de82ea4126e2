"""What a GPU would have to compile for packed rows of several lengths, without compiling: a process of its own.

``python packed_launches.py`` prints a JSON line for each operation: its name and, for each of its kernels, how many
variants Triton would have compiled after the first packed row and after the last. A launch is asked for its key alone,
by which Triton looks for what it has compiled: types, alignments, and the values that are compiled in.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.compile_check import KINDS, compiling_only  # isort: skip  # makes Triton compile, before its import

import torch
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction, compute_cache_key

from linear_moe import kernels

HEADS, WIDTH = 16, 64
BOUNDARIES = ((0, 300, 512), (0, 1, 2, 499), (0, 333, 400, 900, 1000, 1021), (0, 768))
"""Of documents: lengths and numbers that are multiples of 16, odd ones, and ones."""

Variants = dict[str, set[str]]


def variants(call: Callable[[], object]) -> Variants:
    """Of every kernel that ``call`` would launch."""
    found: Variants = {}

    def key_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        _, keys, _, _, binder = self.device_caches[driver.active.get_current_device()]
        _, specialization, options = binder(*args, **kwargs)
        found.setdefault(self.__name__, set()).add(compute_cache_key(keys, specialization, options))

    with compiling_only("packed"), mock.patch.object(JITFunction, "run", key_only):
        call()
    return found


def token(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Zeros that want a gradient."""
    return torch.zeros(*shape, dtype=dtype).requires_grad_()


def both_ways(outputs: Iterator[Tensor | None] | list[Tensor | None], inputs: list[Tensor]) -> None:
    """The backward pass, too."""
    found = [x for x in outputs if x is not None]
    torch.autograd.grad(found, inputs, [torch.zeros_like(x) for x in found])


def arguments(
    op: str, kind: str, shape: tuple[int, int, int], width: int, boundaries: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """Of a scan, or of what a run does to a memory: rows of ``shape`` ``[B, T, H]``, or one with ``boundaries``."""
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
    if not op.endswith("_segment"):
        found["q"] = token(*shape, width)
    return found | ({"cu_seqlens": torch.tensor(boundaries, dtype=torch.int32)} if boundaries else {})


def run(op: str, given: dict[str, Tensor]) -> None:
    """Forward and backward."""
    found = getattr(kernels, op)(**given)
    outputs = [found.state, found.log_decay, found.decay] if op.endswith("_segment") else found
    both_ways(outputs, [x for x in given.values() if x.requires_grad])


def scan(op: str, kind: str, boundaries: tuple[int, ...]) -> None:
    """Of packed documents, each with a memory of its own."""
    given = arguments(op, kind, (1, boundaries[-1], HEADS), WIDTH, boundaries)
    if not op.endswith("_segment"):
        given["state"] = token(len(boundaries) - 1, HEADS, WIDTH, WIDTH, dtype=torch.float32)
    run(op, given)


def small(op: str, _: str, boundaries: tuple[int, ...]) -> None:
    """What stands around a scan, of as many tokens."""
    tokens, operation = boundaries[-1], getattr(kernels, op)
    x, per_token = token(1, tokens, HEADS, WIDTH), token(tokens, dtype=torch.float32)
    order = torch.arange(2 * tokens)
    inputs = {
        "short_conv": [x, token(HEADS, WIDTH, 4)],
        "gated_rms_norm": [x, token(WIDTH), token(1, tokens, HEADS, WIDTH)],
        "rms_norm": [token(1, tokens, WIDTH), token(WIDTH)],
        "weighted_swiglu": [token(tokens, 2 * WIDTH), per_token],
        "spread_rows": [token(tokens, WIDTH)],
        "collect_rows": [token(2 * tokens, WIDTH)],
    }.get(op, [])
    if op == "cross_entropy_":
        operation(token(tokens, 512).detach(), order[:tokens] % 512, per_token.detach())
    elif op == "short_conv":
        both_ways(operation(*inputs, cu_seqlens=torch.tensor(boundaries, dtype=torch.int32)), inputs)
    elif op == "rotate_heads":
        both_ways(operation(x, x, torch.zeros(1, tokens, WIDTH // 2)), [x])
    elif op.endswith("_rows"):
        both_ways([operation(*inputs, order, order.view(-1, 2))], inputs)
    elif op == "rms_norm":
        both_ways(operation(*inputs), inputs)
    elif op == "choose_experts":
        probs, chosen, scores, _ = kernels.choose_experts(logits := token(tokens, 16, dtype=torch.float32), 2)
        *_, sorted_probs = kernels.sort_slots(chosen, probs, 2)
        both_ways([sorted_probs, scores], [logits])
    else:
        both_ways([operation(*inputs)], inputs)


SMALL = (
    "short_conv", "gated_rms_norm", "rms_norm", "rotate_heads", "weighted_swiglu", "spread_rows", "collect_rows",
    "cross_entropy_", "choose_experts",
)  # fmt: skip
CALLS = [(scan, op, kind) for op, kinds in KINDS.items() for kind in kinds] + [
    (small, op, "") for op in SMALL
]


def main() -> None:
    """Every operation."""
    for call, op, kind in CALLS:
        found = [variants(lambda: call(op, kind, boundaries)) for boundaries in BOUNDARIES]  # noqa: B023
        names = sorted({name for launched in found for name in launched})
        counts = {
            name: (
                len(found[0].get(name, ())),
                len(set().union(*(launched.get(name, ()) for launched in found))),
            )
            for name in names
        }
        print(json.dumps([f"{op} {kind}".strip(), counts]), flush=True)


if __name__ == "__main__":
    main()

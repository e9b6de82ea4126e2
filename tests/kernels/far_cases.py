"""Tensors whose offsets do not fit 32 bits, as in sequences of a million tokens; interpreted as the others.

The elements lie 20 million apart in memory that is reserved but never touched between them. A result must be, bit for
bit, that of the same numbers side by side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from interpreted_cases import Cases, Errors
from torch import Tensor

from linear_moe import kernels

TOKENS, APART, WIDTH = 130, 20_000_000, 16
BUFFER = torch.from_numpy(np.empty(TOKENS * APART, np.float16))

CASES = Cases()


def far(x: Tensor, place: int) -> Tensor:
    """``[T, ...]`` with 20 million elements from token to token; several ``place``s share the buffer, like slices."""
    there = BUFFER.as_strided(x.shape, (APART, *x.contiguous().stride()[1:]), place * 1024)
    return there.copy_(x)


@CASES.add("diagonal decay", "diag_decay", ("q", "k", "v"), log_decay=(TOKENS, 1))
@CASES.add("vector decay", "diag_decay", ("q", "k", "v"), log_decay=(TOKENS, 1, WIDTH))
@CASES.add("decay of columns", "diag_decay", ("q", "k", "v"), log_decay_v=(TOKENS, 1, WIDTH))
@CASES.add("delta rule", "delta_rule", ("q", "k", "v"), beta=(TOKENS, 1), log_decay=(TOKENS, 1))
@CASES.add(
    "delta rule, vector decay", "delta_rule", ("q", "k", "v"), beta=(TOKENS, 1), log_decay=(TOKENS, 1, WIDTH)
)
@CASES.add("low rank", "dplr_delta_rule", ("q", "k", "v", "a", "b"), log_decay=(TOKENS, 1, WIDTH))
@CASES.add("segment", "diag_decay_segment", ("k", "v"), log_decay=(TOKENS, 1, WIDTH))
@CASES.add("delta segment", "delta_rule_segment", ("k", "v"), beta=(TOKENS, 1))
def scan(op: str, wide: tuple[str, ...], **others: tuple[int, ...]) -> Errors:
    """Everything of the call lies far apart."""
    inputs = {name: torch.randn(TOKENS, 1, WIDTH).half() * 0.3 for name in wide}
    for name, shape in others.items():
        inputs[name] = torch.rand(shape).half() * (-0.1 if name.startswith("log_decay") else 1)
    return compared(lambda **x: results(getattr(kernels, op)(**{n: y[None] for n, y in x.items()})), inputs)


@CASES.add("short convolution")
def short_conv() -> Errors:
    """Of 16 channels."""
    weight = torch.randn(WIDTH, 4).half()
    return compared(
        lambda x: results(kernels.short_conv(x[None], weight)), {"x": torch.randn(TOKENS, WIDTH).half()}
    )


@CASES.add("short convolution of parts")
def conv_and_split() -> Errors:
    """Of 8 of 16 channels."""
    weight = torch.randn(1, 8, 4).half()
    inputs = {"x": torch.randn(TOKENS, 1, WIDTH).half()}
    return compared(lambda x: results(kernels.conv_and_split(x[None], weight, widths=(4, 4, 8))), inputs)


@CASES.add("gated norm")
def gated_norm() -> Errors:
    """With a gate."""
    inputs = {name: torch.randn(TOKENS, 1, WIDTH).half() for name in ("x", "gate")}
    return compared(lambda x, gate: [kernels.gated_rms_norm(x[None], gate=gate[None])], inputs)


@CASES.add("log decay")
def log_decay() -> Errors:
    """With a bias."""
    bias = torch.randn(1, WIDTH).half()
    inputs = {"x": torch.randn(TOKENS, 1, WIDTH).half()}
    return compared(lambda x: [kernels.log_decay_of(x[None], bias=bias)], inputs)


@CASES.add("bounded decay")
def bounded_decay() -> Errors:
    """Of one head."""
    bound = torch.randn(1, WIDTH)
    inputs = {"x": torch.randn(TOKENS, 1, WIDTH).half()}
    return compared(lambda x: results(kernels.bounded_decay_of(x[None], bound)), inputs)


@CASES.add("mixes")
def lerp_tokens() -> Errors:
    """Two of each token; the logits of both lie side by side."""
    weight = torch.randn(2, WIDTH).half()
    inputs = {name: torch.randn(TOKENS, WIDTH).half() for name in ("x", "other")}
    inputs["logits"] = torch.randn(TOKENS, 2, WIDTH).half()
    return compared(
        lambda x, other, logits: results(kernels.lerp_tokens(x[None], other[None], weight, logits[None])),
        inputs,
    )


@CASES.add("mixes, logits apart")
def lerp_tokens_of_far_logits() -> Errors:
    """Of six mixes, 500 million elements from one to the next."""
    inputs = {"logits": torch.randn(TOKENS, 2, WIDTH).half()}
    x, other = torch.randn(2, 1, 2, WIDTH).half()

    def mixed(logits: Tensor) -> list[Tensor]:
        return results(kernels.lerp_tokens(x, other, None, logits[::25].transpose(0, 1)[None]))

    return compared(mixed, inputs)


@CASES.add("edited keys")
def edit_keys() -> Errors:
    """Of one head."""
    weights = torch.randn(1, WIDTH).half(), torch.randn(1, WIDTH).half()
    inputs = {name: torch.randn(TOKENS, 1, WIDTH).half() for name in ("k", "logits")}
    return compared(lambda k, logits: results(kernels.edit_keys(k[None], logits[None], *weights)), inputs)


@CASES.add("group norm")
def gated_group_norm() -> Errors:
    """Of one head, with what a token reads of its own."""
    weight, bias, bonus = torch.randn(3, 1, WIDTH).half()
    inputs = {name: torch.randn(TOKENS, 1, WIDTH).half() for name in ("x", "gate", "q", "k", "v")}

    def normed(**wide: Tensor) -> list[Tensor]:
        return [
            kernels.gated_group_norm(
                **{n: t[None] for n, t in wide.items()}, weight=weight, bias=bias, bonus=bonus
            )
        ]

    return compared(normed, inputs)


@CASES.add("skip, gate and norm")
def skip_gate_norm() -> Errors:
    """Of one head."""
    weights = torch.randn(1).half(), torch.randn(1, WIDTH).half()
    inputs = {name: torch.randn(TOKENS, 1, WIDTH).half() for name in ("x", "skip", "gate")}
    return compared(
        lambda x, skip, gate: [kernels.skip_gate_norm(x[None], skip[None], *weights, gate[None])], inputs
    )


@CASES.add("skip, gate and norm, heads apart")
def skip_gate_norm_of_far_heads() -> Errors:
    """Of 130 heads, thirteen of an RMS each, and tokens next to each other."""
    weights = torch.randn(TOKENS).half(), torch.randn(TOKENS, WIDTH).half()
    inputs = {name: torch.randn(TOKENS, 2, WIDTH).half() for name in ("x", "skip", "gate")}

    def normed(**far: Tensor) -> list[Tensor]:
        x, skip, gate = (t[None].transpose(1, 2) for t in far.values())
        return [kernels.skip_gate_norm(x, skip, *weights, gate, num_groups=10)]

    return compared(normed, inputs)


@CASES.add("rotary positions")
def rotate_heads() -> Errors:
    """Of six channels of 16."""
    angles = torch.randn(1, TOKENS, 3)
    inputs = {name: torch.randn(TOKENS, 1, WIDTH).half() for name in ("q", "k")}
    return compared(lambda q, k: results(kernels.rotate_heads(q[None], k[None], angles)), inputs)


@CASES.add("rotary positions, heads apart")
def rotate_far_heads() -> Errors:
    """Of 130 heads, and tokens next to each other."""
    angles = torch.randn(1, 2, 8)
    inputs = {name: torch.randn(TOKENS, 2, WIDTH).half() for name in ("q", "k")}

    def rotated(q: Tensor, k: Tensor) -> list[Tensor]:
        return results(kernels.rotate_heads(q[None].transpose(1, 2), k[None].transpose(1, 2), angles))

    return compared(rotated, inputs)


@CASES.add("rows")
def rows() -> Errors:
    """Spread to two slots each."""
    order = torch.randperm(2 * TOKENS)
    place = torch.argsort(order).view(TOKENS, 2)
    return compared(
        lambda x: [kernels.spread_rows(x, order, place)], {"x": torch.randn(TOKENS, WIDTH).half()}
    )


@CASES.add("gated unit")
def swiglu() -> Errors:
    """Of width 8."""
    weight = torch.rand(TOKENS)
    return compared(lambda x: [kernels.weighted_swiglu(x, weight)], {"x": torch.randn(TOKENS, WIDTH).half()})


@CASES.add("cross entropy")
def cross_entropy() -> Errors:
    """Losses, and the gradient that overwrites the logits."""
    logits, labels = torch.randn(TOKENS, WIDTH).half(), torch.randint(0, WIDTH, (TOKENS,))
    there = far(logits, 0)
    found = kernels.cross_entropy_(there, labels, torch.ones(TOKENS))
    expected = kernels.cross_entropy_(logits, labels, torch.ones(TOKENS))
    return {"loss": differs(found, expected), "gradient": differs(there, logits)}


def compared(call: Any, inputs: dict[str, Tensor]) -> Errors:
    """Results and gradients of far tensors, against those of near ones."""
    found, expected = (
        outcome(call, {name: (far(x, n) if is_far else x) for n, (name, x) in enumerate(inputs.items())})
        for is_far in (True, False)
    )
    return {str(n): differs(a, b) for n, (a, b) in enumerate(zip(found, expected, strict=True))}


def outcome(call: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Results, and gradients of their sum."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = call(**leaves)
    total = sum((x.float().sum() for x in outputs), torch.zeros(()))
    return [x.detach() for x in outputs] + list(torch.autograd.grad(total, list(leaves.values())))


def results(found: Any) -> list[Tensor]:
    """Of operations with several; a segment's too."""
    if isinstance(found, tuple):
        return list(found)
    return [x for x in (found.state, found.decay, found.log_decay) if x is not None]


def differs(a: Tensor, b: Tensor) -> float:
    """1 where any bit does."""
    return float(not torch.equal(a, b))


def fused(name: str) -> Errors:
    """The case, with the same numbers every time."""
    torch.manual_seed(0)
    found: Errors = CASES.run(name)
    return found

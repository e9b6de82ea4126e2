"""Fused kernels under settings of torch that a program around them may have made; run_interpreted.py runs these cases.

Results and gradients must be those without the setting, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial

import torch
from interpreted_cases import Cases
from torch import Tensor

from linear_moe import kernels

TOKENS, HEADS, WIDTH = 21, 1, 16
CASES = Cases()
fused = CASES.run
Settings = Callable[[], AbstractContextManager]


def calls() -> list[list[Tensor]]:
    """Results and gradients of operations that make tensors of their own."""
    torch.manual_seed(0)
    q, k, v, a = (
        torch.randn(1, TOKENS, HEADS, WIDTH, dtype=torch.float32, device="cpu") / 4 for _ in range(4)
    )
    log_decay, beta, bonus = -a.abs(), a[..., 0].sigmoid(), a[0, 0]
    return [
        results(lambda q, k, v, u: kernels.diag_decay(q, k, v, bonus=u), q, k, v, bonus),
        results(lambda q, k, v, b, g: kernels.delta_rule(q, k, v, b, g), q, k, v, beta, log_decay),
        results(lambda k, v, g: kernels.diag_decay_segment(k, v, g).log_decay, k, v, log_decay),
        results(lambda k, v, b: kernels.delta_rule_segment(k, v, b).decay, k, v, beta),
        results(lambda x, g: kernels.gated_rms_norm(x, gate=g), q, a),
    ]


def results(run: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> list[Tensor]:
    """Also where something only reads the first result, or the last."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    found = run(*leaves)
    outputs = found if isinstance(found, tuple) else (found,)
    grads = [torch.autograd.grad(y.sum(), leaves, retain_graph=True, allow_unused=True) for y in outputs]
    return [*outputs, *(x for of_one in grads for x in of_one if x is not None)]


def differences(setting: Settings) -> list[str]:
    """Under it, in a process whose tables of constants are new, from none."""
    from linear_moe.kernels.triton import diag_levels

    expected = undisturbed()
    diag_levels.level_sums.cache_clear()
    with setting():
        found = calls()
    return [
        f"call {number} differs"
        for number, (outcome, truth) in enumerate(zip(found, expected, strict=True))
        if not all(map(torch.equal, outcome, truth))
    ]


@cache
def undisturbed() -> list[list[Tensor]]:
    """Without any setting."""
    return calls()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Of what is made without one."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    """What is allocated holds NaN, and operations that are not deterministic raise."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def inference_before() -> Iterator[None]:
    """Tables of constants are made in inference mode."""
    q = torch.zeros(1, TOKENS, HEADS, WIDTH)
    with torch.inference_mode():
        kernels.diag_decay(q, q, q, q)
        kernels.delta_rule(q, q, q, q[..., 0], q)
        kernels.diag_decay(q, q, q, bonus=q[0, 0])
    yield


CASES.add("float64 by default", partial(default_dtype, torch.float64))(differences)
CASES.add("another device by default", partial(torch.device, "meta"))(differences)
CASES.add("deterministic algorithms", deterministic)(differences)
CASES.add("autocast", partial(torch.autocast, "cpu", torch.bfloat16))(differences)
CASES.add("inference before", inference_before)(differences)

"""Log decays from logits: torch path and fused kernel (interpreted) against exponentials and logarithms in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from log_decay_cases import CASES, errors, make
from run_interpreted import errors_of_picked
from torch import Tensor

from linear_moe.kernels import log_decay, log_decay_of

EXACT, SINGLE = 1e-8, 1e-5
"""torch's softplus is its argument from 20 on, and 2e-9 off there."""


@pytest.fixture(scope="module")
def fused_errors(request: pytest.FixtureRequest) -> Callable[[str], list[float]]:
    return errors_of_picked(request, "log_decay_cases")


@pytest.mark.parametrize("name", CASES)
def test_torch_path_is_exact(name: str) -> None:
    assert max(errors(name, log_decay.log_decay_of, torch.float64)) <= EXACT


@pytest.mark.parametrize("name", CASES)
def test_fused_kernel(name: str, fused_errors: Callable[[str], list[float]]) -> None:
    num_tensors = 1 + ("rate" in CASES[name]) + ("bias" in CASES[name])
    assert len(fused_errors(name)) == 1 + num_tensors + 1
    assert max(fused_errors(name)) <= SINGLE


def test_half_precision_gives_float32_and_keeps_inputs_only() -> None:
    given = make("softplus, rate and bias", torch.float32)
    inputs = {n: t for n, t in given.items() if isinstance(t, Tensor)}
    x = given["x"].detach().bfloat16().requires_grad_()
    ours = {t.untyped_storage().data_ptr() for t in (x, *inputs.values())}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = log_decay_of(**{**given, "x": x})
    assert kept and {t.untyped_storage().data_ptr() for t in kept} <= ours
    assert y.dtype == torch.float32 and torch.equal(y, log_decay_of(**{**given, "x": x.detach().float()}))
    (dx,) = torch.autograd.grad(y.sum(), [x])
    assert dx.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(2, 5)), r"x has shape \[2, 5\]"),
        (dict(rate=torch.zeros(4)), r"rate has shape \[4\]"),
        (dict(bias=torch.zeros(4)), r"bias has shape \[4\]"),
        (dict(form="relu"), "form is 'relu'"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_decay_of(**{"x": torch.zeros(1, 2, 3, 4), **change})

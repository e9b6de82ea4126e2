"""RMS norm with weight and gate: the torch path and the fused kernel (interpreted) against PyTorch's own norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from norm_cases import CASES, largest_error, make
from run_interpreted import errors_of_picked
from torch import Tensor

from linear_moe.kernels import gated_norm, gated_rms_norm

EXACT, SINGLE = 1e-12, 1e-5


@pytest.fixture(scope="module")
def fused_errors(request: pytest.FixtureRequest) -> Callable[[str], float]:
    return errors_of_picked(request, "norm_cases")


@pytest.mark.parametrize("name", CASES)
def test_torch_path_is_exact(name: str) -> None:
    assert largest_error(name, gated_norm.gated_rms_norm, torch.float64) <= EXACT


@pytest.mark.parametrize("name", CASES)
def test_fused_kernel(name: str, fused_errors: Callable[[str], float]) -> None:
    assert fused_errors(name) <= SINGLE


def test_training_keeps_inputs_only() -> None:
    inputs = make("weight per head, swish", torch.float32)
    ours = {x.untyped_storage().data_ptr() for x in inputs.values() if isinstance(x, Tensor)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        gated_rms_norm(**inputs)
    assert kept and {x.untyped_storage().data_ptr() for x in kept} <= ours


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(2, 3, 4)), r"x has shape \[2, 3, 4\]"),
        (dict(x=torch.zeros(1, 2, 3, 4).int()), "x is torch.int32"),
        (dict(weight=torch.zeros(4).int()), "weight is torch.int32"),
        (dict(gate=torch.zeros(1, 2, 3, 4).int()), "gate is torch.int32"),
        (dict(weight=torch.zeros(5)), r"weight has shape \[5\]"),
        (dict(gate=torch.zeros(1, 2, 3, 5)), r"gate has shape"),
        (dict(activation="relu"), "activation is 'relu'"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(**{"x": torch.zeros(1, 2, 3, 4), **change})

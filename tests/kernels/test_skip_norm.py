"""The norm behind a skip and a gate: torch path and fused kernel (interpreted) against PyTorch's own norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from run_interpreted import errors_of_picked
from skip_norm_cases import CASES, errors, make
from torch import Tensor

from linear_moe.kernels import dispatch, skip_gate_norm, skip_norm

EXACT, SINGLE = 1e-12, 1e-5


@pytest.fixture(scope="module")
def fused_errors(request: pytest.FixtureRequest) -> Callable[[str], list[float]]:
    return errors_of_picked(request, "skip_norm_cases")


@pytest.mark.parametrize("name", CASES)
def test_torch_path_is_exact(name: str) -> None:
    assert max(errors(name, skip_norm.skip_gate_norm, torch.float64)) <= EXACT


@pytest.mark.parametrize("name", CASES)
def test_fused_kernel(name: str, fused_errors: Callable[[str], list[float]]) -> None:
    num_tensors = 2 + ("gate" in CASES[name]) + 2 * CASES[name].get("skip", True)
    assert len(fused_errors(name)) == 1 + num_tensors
    assert max(fused_errors(name)) <= SINGLE


def test_training_keeps_inputs_only() -> None:
    inputs = make("time first, slices", torch.float32)
    ours = {x.untyped_storage().data_ptr() for x in inputs.values() if isinstance(x, Tensor)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        skip_gate_norm(**inputs)
    assert kept and {x.untyped_storage().data_ptr() for x in kept} <= ours


def test_groups_that_no_program_can_hold_are_for_torch() -> None:
    (fused,) = (b for b in dispatch.BACKENDS["skip_gate_norm"] if b.name == "triton")
    x = torch.empty(1, 1, 130, 64)
    assert not fused.takes(x) and fused.takes(x, num_groups=2) and fused.takes(x[:, :, :128])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(skip=torch.zeros(1, 2, 3, 5)), "skip has shape"),
        (dict(skip=None), "skip_weight is not None"),
        (dict(skip_weight=torch.zeros(4)), r"skip_weight has shape \[4\]"),
        (dict(weight=torch.zeros(4)), r"weight has shape \[4\]"),
        (dict(gate=torch.zeros(1, 2, 3)), "gate has shape"),
        (dict(num_groups=2), "num_groups is 2"),
        (dict(activation="relu"), "activation is 'relu'"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    x = torch.zeros(1, 2, 3, 4)
    right = dict(x=x, skip=x, skip_weight=torch.zeros(3), weight=torch.zeros(3, 4))
    with pytest.raises(ValueError, match=message):
        skip_gate_norm(**{**right, **change})

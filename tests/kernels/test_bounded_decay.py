"""Gates with a lower bound: torch path and fused kernel (interpreted) against logarithms in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bounded_decay_cases import CASES, errors, make, of_little
from run_interpreted import errors_of_picked
from torch import Tensor

from linear_moe.kernels import bounded_decay, bounded_decay_of

EXACT, SINGLE, HALF = 1e-12, 1e-6, 1e-3
OF_LITTLE = 5e-6
"""Of a number far out, float32 knows the exponential to as many units in the last place as it has binary digits."""


@pytest.fixture(scope="module")
def fused_errors(request: pytest.FixtureRequest) -> Callable[[str], list[list[float]]]:
    return errors_of_picked(request, "bounded_decay_cases")


@pytest.mark.parametrize("name", CASES)
def test_torch_path_is_exact(name: str) -> None:
    assert max(errors(name, bounded_decay.bounded_decay_of, torch.float64)) <= EXACT


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, OF_LITTLE)])
def test_torch_path_far_out(dtype: torch.dtype, tolerance: float) -> None:
    found = of_little(bounded_decay.bounded_decay_of, dtype)
    assert len(found) == 6 and max(found) <= tolerance, found


@pytest.mark.parametrize("name", CASES)
def test_fused_kernel(name: str, fused_errors: Callable[[str], list[list[float]]]) -> None:
    """Results, and two gradients of each of three sums of them."""
    found, of_single = fused_errors(name)
    assert len(found) == 8 and len(of_single) == 6
    assert max(found) <= (HALF if name == "float16" else SINGLE), found
    assert max(of_single) <= OF_LITTLE, of_single


def test_half_precision_gives_float32_and_keeps_inputs_only() -> None:
    x, bound = (t.detach() for t in make("two rows", torch.float32))
    x = x.bfloat16().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        k, log_decay = bounded_decay_of(x, bound)
    ours = {t.untyped_storage().data_ptr() for t in (x, bound)}
    assert kept and {t.untyped_storage().data_ptr() for t in kept} <= ours
    in_float32 = bounded_decay_of(x.detach().float(), bound)
    assert log_decay.dtype == torch.float32 and torch.equal(log_decay, in_float32[1])
    assert k.dtype == torch.bfloat16 and torch.equal(k, in_float32[0].bfloat16())
    (dx,) = torch.autograd.grad(k.sum() + log_decay.sum(), [x])
    assert dx.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(2, 5)), r"x has shape \[2, 5\]"),
        (dict(bound=torch.zeros(4)), r"bound has shape \[4\]"),
        (dict(bound=torch.zeros(3, 4).int()), r"bound is torch.int32"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bounded_decay_of(**{"x": torch.zeros(1, 2, 3, 4), "bound": torch.zeros(3, 4), **change})

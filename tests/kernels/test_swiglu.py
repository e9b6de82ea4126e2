"""The weighted gated unit: torch path and fused kernel (interpreted) against one row after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from run_interpreted import errors_of_picked
from swiglu_cases import CASES, errors

from linear_moe.kernels import swiglu, weighted_swiglu

EXACT, SINGLE = 1e-12, 1e-5


@pytest.fixture(scope="module")
def fused_errors(request: pytest.FixtureRequest) -> Callable[[str], list[float]]:
    return errors_of_picked(request, "swiglu_cases")


@pytest.mark.parametrize("name", CASES)
def test_torch_path_is_exact(name: str) -> None:
    assert max(errors(name, swiglu.weighted_swiglu, torch.float64)) <= EXACT


@pytest.mark.parametrize("name", CASES)
def test_fused_kernel(name: str, fused_errors: Callable[[str], list[float]]) -> None:
    assert len(fused_errors(name)) == 3 and max(fused_errors(name)) <= SINGLE


def test_no_rows() -> None:
    assert weighted_swiglu(torch.zeros(0, 6), torch.zeros(0)).shape == (0, 3)


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"x has shape \[2, 5\]"):
        weighted_swiglu(torch.zeros(2, 5), torch.zeros(2))
    with pytest.raises(ValueError, match=r"x has shape \[6\]"):
        weighted_swiglu(torch.zeros(6), torch.zeros(6))
    with pytest.raises(ValueError, match=r"x is torch.int32"):
        weighted_swiglu(torch.zeros(2, 6).int(), torch.zeros(2))
    with pytest.raises(ValueError, match=r"weight is torch.int32"):
        weighted_swiglu(torch.zeros(2, 6), torch.zeros(2).int())
    with pytest.raises(ValueError, match=r"weight has shape \[3\]"):
        weighted_swiglu(torch.zeros(2, 6), torch.zeros(3))

"""The norm of a residual stream: torch path and fused kernel (interpreted) against one token after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rms_norm_cases import CASES, errors
from run_interpreted import errors_of_picked

from linear_moe.kernels import dispatch, rms_norm

EXACT, SINGLE = 1e-12, 1e-5


@pytest.fixture(scope="module")
def fused_errors(request: pytest.FixtureRequest) -> Callable[[str], list[float]]:
    return errors_of_picked(request, "rms_norm_cases")


@pytest.mark.parametrize("name", CASES)
def test_torch_path_is_exact(name: str) -> None:
    assert max(errors(name, rms_norm, torch.float64)) <= EXACT


@pytest.mark.parametrize("name", CASES)
def test_fused_kernel(name: str, fused_errors: Callable[[str], list[float]]) -> None:
    assert len(fused_errors(name)) == 3 and max(fused_errors(name)) <= SINGLE


def test_no_tokens() -> None:
    y, x = rms_norm(torch.zeros(2, 0, 6), torch.zeros(6))
    assert y.shape == x.shape == (2, 0, 6)


def test_tokens_that_no_program_can_hold_are_for_torch() -> None:
    (fused,) = (b for b in dispatch.BACKENDS["rms_norm"] if b.name == "triton")
    assert fused.takes(torch.empty(1, 1, 8192)) and not fused.takes(torch.empty(1, 1, 8193))


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"x has shape \[2, 5\]"):
        rms_norm(torch.zeros(2, 5), torch.zeros(5))
    with pytest.raises(ValueError, match=r"weight has shape \[4\]"):
        rms_norm(torch.zeros(1, 2, 5), torch.zeros(4))
    with pytest.raises(ValueError, match=r"weight is torch.int32"):
        rms_norm(torch.zeros(1, 2, 5), torch.zeros(5).int())

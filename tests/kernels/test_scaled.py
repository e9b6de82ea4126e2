"""Heads times a number each: torch path and fused kernel (interpreted) against one head after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from run_interpreted import errors_of_picked
from scaled_cases import CASES, errors

from linear_moe.kernels import scale_heads, scaled

EXACT, SINGLE = 1e-12, 1e-5


@pytest.fixture(scope="module")
def fused_errors(request: pytest.FixtureRequest) -> Callable[[str], list[float]]:
    return errors_of_picked(request, "scaled_cases")


@pytest.mark.parametrize("name", CASES)
def test_torch_path_is_exact(name: str) -> None:
    assert max(errors(name, scaled.scale_heads, torch.float64)) <= EXACT


@pytest.mark.parametrize("name", CASES)
def test_fused_kernel(name: str, fused_errors: Callable[[str], list[float]]) -> None:
    assert len(fused_errors(name)) == 3 and max(fused_errors(name)) <= SINGLE


def test_weights_may_be_wider_than_heads() -> None:
    x, weight = torch.randn(1, 2, 3, 4).bfloat16().requires_grad_(), torch.rand(1, 2, 3, requires_grad=True)
    y = scale_heads(x, weight)
    assert y.dtype == torch.bfloat16 and torch.equal(y, (x.float() * weight[..., None]).bfloat16())
    assert [g.dtype for g in torch.autograd.grad(y.sum(), [x, weight])] == [torch.bfloat16, torch.float32]


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"x has shape \[2, 5\]"):
        scale_heads(torch.zeros(2, 5), torch.zeros(2))
    with pytest.raises(ValueError, match=r"weight has shape \[3\]"):
        scale_heads(torch.zeros(1, 2, 3, 4), torch.zeros(3))

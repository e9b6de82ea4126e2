"""The fused short convolution, kernels interpreted on the CPU, against the token loop: forward and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from run_interpreted import errors_of_picked
from triton_conv_cases import CASES

SINGLE = 1e-5


@pytest.fixture(scope="module")
def largest_error(request: pytest.FixtureRequest) -> Callable[[str], float]:
    return errors_of_picked(request, "triton_conv_cases")


@pytest.mark.parametrize("name", CASES)
def test_equals_token_loop(name: str, largest_error: Callable[[str], float]) -> None:
    assert largest_error(name) <= SINGLE

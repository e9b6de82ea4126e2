"""The fused segments, kernels interpreted on the CPU, against the token loop: forward and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from interpreted_cases import Errors
from run_interpreted import errors_of_picked
from triton_segment_cases import CASES

SINGLE, HALF = 1e-5, 2e-3


@pytest.fixture(scope="module")
def errors_of(request: pytest.FixtureRequest) -> Callable[[str], Errors]:
    return errors_of_picked(request, "triton_segment_cases")


@pytest.mark.parametrize("name", CASES)
def test_equals_token_loop(name: str, errors_of: Callable[[str], Errors]) -> None:
    tolerance = HALF if "half" in name else SINGLE
    errors = errors_of(name)
    assert errors and all(error <= tolerance for error in errors.values()), errors

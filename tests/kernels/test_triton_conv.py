"""The fused short convolution, kernels interpreted on the CPU, against the token loop: forward and every gradient."""

from __future__ import annotations

import pytest
from run_interpreted import run_interpreted
from triton_conv_cases import CASES, PLAIN

SINGLE = 1e-5


@pytest.fixture(scope="module")
def largest_errors() -> dict[str, float]:
    """All cases in one process, which Triton's interpreter needs for itself."""
    return dict(run_interpreted("triton_conv_cases.py", *CASES, PLAIN))


@pytest.mark.parametrize("name", [*CASES, PLAIN])
def test_equals_token_loop(name: str, largest_errors: dict[str, float]) -> None:
    assert largest_errors[name] <= SINGLE

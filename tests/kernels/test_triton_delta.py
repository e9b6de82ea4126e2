"""The fused delta rule, kernels interpreted on the CPU, against the token loop: forward and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from compiled_kernels import compiled
from interpreted_cases import Errors
from run_interpreted import errors_of_picked
from triton_delta_cases import CASES

SINGLE, HALF = 1e-5, 2e-3


@pytest.fixture(scope="module")
def errors_of(request: pytest.FixtureRequest) -> Callable[[str], Errors]:
    return errors_of_picked(request, "triton_delta_cases")


@pytest.mark.parametrize("name", CASES)
def test_equals_token_loop(name: str, errors_of: Callable[[str], Errors]) -> None:
    tolerance = HALF if "half" in name else SINGLE
    errors = errors_of(name)
    assert errors and all(error <= tolerance for error in errors.values()), errors


@pytest.mark.parametrize("name", ["roundings of half precision"])
def test_scores_and_writes_are_rounded_to_two_parts(name: str, errors_of: Callable[[str], Errors]) -> None:
    """In one part o is off by 5.6e-4, the state by 4.8e-4."""
    errors = errors_of(name)
    assert errors["o"] <= 5.2e-4 and errors["state"] <= 4.2e-4, errors


def test_fits_an_h100(tmp_path: Path) -> None:
    """Compiled for sm_90: no spills, and shared memory that a program can have."""
    calls = "--kinds", "scalar", "vector", "--dims", "128x128", "--dtypes", "bfloat16"
    kernels = {row["kernel"] for row in compiled(tmp_path, "--ops", "delta_rule", *calls)}
    scans = {"delta_forward_kernel", "delta_backward_kernel", "delta_output_kernel"}
    assert {
        *scans,
        "delta_solve_kernel",
        "delta_pairs_kernel",
        "delta_gradient_kernel",
        "delta_solve_weak_kernel",
        "delta_solve_levels_kernel",
        "delta_vector_pairs_kernel",
        "delta_vector_gradient_kernel",
        "delta_vector_gradient_weak_kernel",
    } <= kernels

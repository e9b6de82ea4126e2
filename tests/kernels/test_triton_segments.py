"""The fused segments, kernels interpreted on the CPU, against the token loop: forward and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from run_interpreted import run_interpreted
from triton_segment_cases import CASES

SINGLE, HALF = 1e-5, 2e-3
Errors = dict[str, float]


@pytest.fixture(scope="module")
def errors_of(request: pytest.FixtureRequest) -> Callable[[str], Errors]:
    """One process runs the cases of every test that was picked: importing torch costs more than most of them."""
    picked = {item.callspec.params["name"] for item in request.session.items if item.path == Path(__file__)}
    found = dict(run_interpreted("triton_segment_cases.py", *sorted(picked)))

    def get(name: str) -> Errors:
        if isinstance(found[name], str):
            pytest.fail(found[name])
        return found[name]

    return get


@pytest.mark.parametrize("name", CASES)
def test_equals_token_loop(name: str, errors_of: Callable[[str], Errors]) -> None:
    tolerance = HALF if "half" in name else SINGLE
    errors = errors_of(name)
    assert errors and all(error <= tolerance for error in errors.values()), errors

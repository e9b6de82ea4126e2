"""Fused kernels at addresses whose offset does not fit 32 bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from interpreted_cases import Errors
from run_interpreted import errors_of_picked

NAMES = (
    "diagonal decay", "vector decay", "decay of columns", "delta rule", "delta rule, vector decay", "segment",
    "low rank", "delta segment", "short convolution", "gated norm", "skip, gate and norm", "rows", "gated unit",
    "cross entropy", "rotary positions", "rotary positions, heads apart", "skip, gate and norm, heads apart",
    "short convolution of parts", "log decay", "bounded decay", "mixes", "mixes, logits apart", "edited keys",
    "group norm",
)  # fmt: skip


@pytest.fixture(scope="module")
def errors_of(request: pytest.FixtureRequest) -> Callable[[str], Errors]:
    return errors_of_picked(request, "far_cases")


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_as_nearby(name: str, errors_of: Callable[[str], Errors]) -> None:
    errors = errors_of(name)
    assert errors and not any(errors.values()), errors

"""Rows between tokens and slots: torch path and fused kernels (interpreted) against loops over rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from row_cases import CASES, errors, make
from run_interpreted import errors_of_picked

from linear_moe import kernels
from linear_moe.kernels import collect_rows, rows, spread_rows

EXACT, SINGLE = 1e-12, 1e-5


@pytest.fixture(scope="module")
def fused_errors(request: pytest.FixtureRequest) -> Callable[[str], list[float]]:
    return errors_of_picked(request, "row_cases")


@pytest.mark.parametrize("name", CASES)
def test_torch_path_is_exact(name: str) -> None:
    assert max(errors(name, rows, torch.float64)) <= EXACT


@pytest.mark.parametrize("name", CASES)
def test_fused_kernels(name: str, fused_errors: Callable[[str], list[float]]) -> None:
    assert len(fused_errors(name)) == 6 and max(fused_errors(name)) <= SINGLE


def test_whole_numbers_travel_too() -> None:
    given = make("three slots, heads", torch.float64)
    positions = torch.arange(6)
    assert torch.equal(spread_rows(positions, given["order"], given["place"]), given["order"] // 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(order=torch.zeros(6, dtype=torch.int32)), "order is torch.int32"),
        (dict(order=torch.zeros(6, dtype=torch.int64, device="meta")), "order is torch.int64 on meta"),
        (dict(place=torch.zeros(3, 3, dtype=torch.int64)), r"place has shape \[3, 3\]"),
        (dict(x=torch.zeros(4, 2)), "x has 4 rows"),
    ],
)
@pytest.mark.parametrize("function", [spread_rows, collect_rows])
def test_refuses_what_does_not_fit(function: Any, change: dict[str, Any], message: str) -> None:
    order = torch.arange(6)
    num_rows = 3 if function is kernels.spread_rows else 6
    with pytest.raises(ValueError, match=message):
        function(**{**dict(x=torch.zeros(num_rows, 2), order=order, place=order.view(3, 2)), **change})


def test_rows_of_slots_are_not_those_of_tokens() -> None:
    """The first rows would be spread, and the others left out."""
    order = torch.arange(6)
    with pytest.raises(
        ValueError, match=r"^x has 6 rows\n  why: it has a row for each token of .*\n  try: 3 rows$"
    ):
        spread_rows(torch.zeros(6, 2), order, order.view(3, 2))
    with pytest.raises(
        ValueError, match=r"^x has 3 rows\n  why: it has a row for each slot of .*\n  try: 6 rows$"
    ):
        collect_rows(torch.zeros(3, 2), order, order.view(3, 2))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3, 1), r"weight has shape \[3, 1\]\n"),
        (torch.ones(2), r"weight has shape \[2\]\n"),
        (torch.ones(3, 2, dtype=torch.int64), "weight is torch.int64\n"),
        (torch.ones(3, 2, device="meta"), "weight is on meta\n"),
    ],
)
def test_refuses_weights_that_are_not_of_slots(weight: torch.Tensor, message: str) -> None:
    """Torch would broadcast them, and a kernel read what lies behind them."""
    order = torch.arange(6)
    with pytest.raises(ValueError, match=message):
        collect_rows(torch.zeros(6, 2), order, order.view(3, 2), weight)

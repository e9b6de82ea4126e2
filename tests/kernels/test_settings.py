"""Settings of torch around the fused kernels change nothing that these compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from run_interpreted import errors_of_picked
from settings_cases import CASES


@pytest.fixture(scope="module")
def wrong(request: pytest.FixtureRequest) -> Callable[[str], list[str]]:
    return errors_of_picked(request, "settings_cases")


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_without_it(name: str, wrong: Callable[[str], list[str]]) -> None:
    assert not wrong(name)

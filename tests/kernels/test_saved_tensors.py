"""What the fused kernels keep for their backward pass is what autograd knows of: for hooks, checkpoints, changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from run_interpreted import errors_of_picked
from saved_cases import CASES


@pytest.fixture(scope="module")
def wrong(request: pytest.FixtureRequest) -> Callable[[str], list[str]]:
    return errors_of_picked(request, "saved_cases")


@pytest.mark.parametrize("name", CASES)
def test_autograd_knows_all_that_is_kept(name: str, wrong: Callable[[str], list[str]]) -> None:
    assert not wrong(name)

"""Our mixers against the layers of flash-linear-attention 0.6.0, in float64, with exchanged weights."""

from __future__ import annotations

import pytest

from tests.oracle import fla_decay, fla_delta, fla_mom, fla_shift
from tests.oracle.exchange import check

CASES = fla_decay.CASES | fla_delta.CASES | fla_shift.CASES | fla_mom.CASES


@pytest.mark.parametrize("name", CASES)
def test_fla(name: str):
    check(CASES[name])

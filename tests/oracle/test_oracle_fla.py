"""Our mixers against the layers of flash-linear-attention 0.6.0, in float64, with exchanged weights."""

from __future__ import annotations

import pytest

from linear_moe import lsm
from tests.oracle import fla_decay, fla_delta, fla_mom, fla_shift
from tests.oracle.exchange import check

CASES = fla_decay.CASES | fla_delta.CASES | fla_shift.CASES | fla_mom.CASES


def test_every_mixer_has_an_oracle():
    """Of mixtures of memories the library has one, over Gated DeltaNet."""
    mixers = {name for name in lsm.names() if not name.startswith("mom_")} | {"mom_gated_deltanet"}
    assert {case.mixer for case in CASES.values()} == mixers


@pytest.mark.parametrize("name", CASES)
def test_fla(name: str):
    check(CASES[name])

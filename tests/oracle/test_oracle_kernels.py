"""Layers of flash-linear-attention with their Triton kernels give what they give with the library's naive functions.

So the comparison of our mixers with the latter (``test_oracle_fla.py``) is one with the library as people run it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from tests.oracle.exchange import errors, theirs
from tests.oracle.test_oracle_fla import CASES

INTERPRETED = ("linear_attention-elu", "gla-conv", "gated_deltanet-negative")
"""One case for each replaced function; the interpreter is slow."""


def test_kernels(tmp_path: Path):
    results = tmp_path / "results.pt"
    command = [sys.executable, "-m", "tests.oracle.interpreted", str(results), *INTERPRETED]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], timeout=300)
    found = torch.load(results)
    for name in INTERPRETED:
        wrong = errors(found[name], theirs(CASES[name]))
        assert all(error <= 1e-5 for error in wrong.values()), (name, wrong)

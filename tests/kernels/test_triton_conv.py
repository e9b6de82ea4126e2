"""The fused short convolution, kernels interpreted on the CPU, against the token loop: forward and every gradient."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from triton_conv_cases import CASES, PLAIN

SINGLE = 1e-5


@pytest.fixture(scope="module")
def largest_errors() -> dict[str, float]:
    """All cases in one process, which Triton's interpreter needs for itself."""
    command = [sys.executable, str(Path(__file__).with_name("triton_conv_cases.py")), *CASES, PLAIN]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return dict(json.loads(line) for line in run.stdout.splitlines())


@pytest.mark.parametrize("name", [*CASES, PLAIN])
def test_equals_token_loop(name: str, largest_errors: dict[str, float]) -> None:
    assert largest_errors[name] <= SINGLE

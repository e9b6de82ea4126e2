"""RWKV7's rule, fused, kernels interpreted on the CPU, against the token loop: forward and every gradient."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from interpreted_cases import Errors
from run_interpreted import errors_of_picked
from triton_dplr_cases import CASES

SINGLE, HALF = 1e-5, 2e-3


@pytest.fixture(scope="module")
def errors_of(request: pytest.FixtureRequest) -> Callable[[str], Errors]:
    return errors_of_picked(request, "triton_dplr_cases")


@pytest.mark.parametrize("name", CASES)
def test_equals_token_loop(name: str, errors_of: Callable[[str], Errors]) -> None:
    tolerance = HALF if "half" in name else SINGLE
    errors = errors_of(name)
    assert errors and all(error <= tolerance for error in errors.values()), errors


def test_fits_an_h100(tmp_path: Path) -> None:
    """Compiled for sm_90: no spills, and shared memory that a program can have."""
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "benchmarks/compile_check.py"), "--ops", "dplr_delta_rule"]
    command += ["--dims", "64x64", "128x128", "--dtypes", "bfloat16"]
    environment = {**os.environ, "PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    found = tmp_path / "found.json"
    run = subprocess.run(
        [*command, "--json", str(found)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    compiled = {row["kernel"] for row in json.loads(found.read_text())["rows"]}
    assert compiled == {f"dplr_{name}_kernel" for name in ("solve", "scan", "read", "pairs", "gradient")}

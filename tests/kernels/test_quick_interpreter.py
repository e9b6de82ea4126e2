"""Triton's interpreter computes the same bits without its bookkeeping, and what was replaced is what Triton has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from run_interpreted import run_interpreted

HERE = Path(__file__).parent
PICKED = {"triton_delta_cases": ["scalar half precision"], "route_cases": ["odd numbers"]}


@pytest.mark.parametrize("module", PICKED)
def test_every_error_is_the_same(module: str) -> None:
    """Errors against float64, to the last digit: of results that differ in one bit they would not be."""
    quick, plain = (
        run_interpreted("run_interpreted.py", *how, module, *PICKED[module]) for how in ([], ["--plain"])
    )
    assert [name for name, _ in quick] == PICKED[module]
    assert quick == plain and not any(isinstance(found, str) for _, found in quick), quick


def test_nothing_that_is_replaced_has_gone() -> None:
    """With another version of Triton it may: then tests take longer, and this says why."""
    program = (
        "import os; os.environ['TRITON_INTERPRET'] = '1'; import quick_interpreter; quick_interpreter.install(); "
        "from triton.runtime import interpreter; print(interpreter._get_np_dtype.__module__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=HERE, capture_output=True, text=True, timeout=200
    )
    assert run.stdout == "quick_interpreter\n", run.stdout + run.stderr[-3000:]

"""Cases in Triton's interpreter, in a process of their own: Triton decides when it is imported whether it interprets.

``python run_interpreted.py [--plain] MODULE NAME ...`` prints a JSON line for each of a module's cases, all if none is
named: the name, and what ``MODULE.fused(name)`` returns, the errors of the case's results, or how it failed.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def run_interpreted(program: str, *arguments: str) -> list[Any]:
    """The JSON lines that a program of this folder prints, which makes Triton interpret; its error if it fails."""
    command = [sys.executable, str(Path(__file__).with_name(program)), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def errors_of_picked(request: pytest.FixtureRequest, module: str) -> Callable[[str], Any]:
    """The errors of a case by its name, for a fixture of tests whose parameter ``name`` is a case's.

    One process runs the cases of every test that was picked: importing torch costs more than most of them.
    """
    users = [item for item in request.session.items if request.fixturename in item.fixturenames]
    picked = {item.callspec.params["name"] for item in users if item.path == request.path}
    found = dict(run_interpreted(Path(__file__).name, module, *sorted(picked)))

    def get(name: str) -> Any:
        if isinstance(found[name], str):
            pytest.fail(found[name])
        return found[name]

    return get


def main(module: str, *names: str, is_quick: bool = True) -> None:
    """Run cases; memory that is never written holds NaN."""
    os.environ.update(TRITON_INTERPRET="1", LINEAR_MOE_KERNELS="triton")
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import quick_interpreter
    import torch
    from scan_cases import poison_empty

    if is_quick:
        quick_interpreter.install(watch_overflow=module == "far_cases")
    torch.set_num_threads(1)
    cases: Any = importlib.import_module(module)
    poison_empty(pytest.MonkeyPatch())
    for name in names or cases.CASES:
        try:
            outcome = cases.fused(name)
        except Exception:  # the other cases go on
            outcome = traceback.format_exc()
        print(json.dumps([name, outcome]), flush=True)


if __name__ == "__main__":
    plain = sys.argv[1:2] == ["--plain"]
    main(*sys.argv[1 + plain :], is_quick=not plain)

"""Run a program of cases in a process of its own: Triton decides when it is imported whether it interprets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_interpreted(program: str, *arguments: str) -> list[Any]:
    """The JSON lines that a program of this folder prints, which makes Triton interpret; its error if it fails."""
    command = [sys.executable, str(Path(__file__).with_name(program)), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]

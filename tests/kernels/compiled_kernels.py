"""What benchmarks/compile_check.py compiles for Hopper, without a GPU, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def compiled(folder: Path, *arguments: str, may_spill: bool = False) -> list[dict[str, Any]]:
    """A row for each kernel; fails if one spills registers, or wants more shared memory than a program can have."""
    command = [sys.executable, str(ROOT / "benchmarks/compile_check.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder / "cache")}
    found = folder / "found.json"
    run = subprocess.run(
        [*command, "--json", str(found)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0 or (may_spill and run.returncode == 1), run.stdout + run.stderr
    report = json.loads(found.read_text())
    assert not report["failed"], run.stdout
    return report["rows"]

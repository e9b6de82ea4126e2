"""The fused kernels compile for Hopper without a GPU, spill nothing, and fit its shared memory: a few of the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_fits_an_h100(tmp_path: Path) -> None:
    calls = "--kinds", "scalar", "vector", "--dims", "128x128", "--dtypes", "bfloat16"
    ops = "--ops", "diag_decay", "diag_decay_segment"
    command = [sys.executable, str(ROOT / "benchmarks/compile_check.py"), *ops, *calls]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    found = tmp_path / "found.json"
    run = subprocess.run(
        [*command, "--json", str(found)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads(found.read_text())["rows"]
    assert len(rows) >= 15 and all(row["registers"] > 16 and row["resident"] >= 1 for row in rows)
    assert all(row["spilled"] == 0 and row["shared"] <= 227 * 1024 for row in rows)
    scans = {"scan_kernel", "scaled_scan_kernel", "scale_kernel", "combine_kernel"}
    segments = {"local_segment_kernel", "after_kernel", "segment_gradient_kernel"}
    assert scans | segments <= {row["kernel"] for row in rows}

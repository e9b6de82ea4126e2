"""benchmarks/kernels.py runs through in its smoke sizes, interpreted on a CPU, and tells failures from results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(out: Path, *options: str) -> tuple[int, list[dict]]:
    command = [sys.executable, str(ROOT / "benchmarks/kernels.py"), "--smoke", "--json", str(out), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert out.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(out.read_text())["rows"]


def test_every_part_runs(tmp_path: Path) -> None:
    code, rows = run(
        tmp_path / "out.json", "--families", "linear", "rwkv7", "--sweep", "--shapes", "tiny_packed"
    )
    assert code == 0, rows
    parts = {row["part"]: row for row in rows if row["family"] == "linear" and row["who"] == "ours"}
    assert parts["right"]["worst"] < 1e-5 and not parts["right"]["bad"]
    assert parts["time"]["both_ms"] > 0 and parts["time"]["over_floor"] > 1
    assert parts["sweep"]["best"][0]["ms"] > 0
    assert all("skipped" in row for row in rows if row["who"] == "peer")


def test_the_rest_goes_on_when_time_is_over(tmp_path: Path) -> None:
    code, rows = run(tmp_path / "out.json", "--families", "linear", "--minutes", "0", "--parts", "right")
    assert code == 0 and len(rows) == 2 and all(row["skipped"] == "out of time" for row in rows)

"""benchmarks/predict_kernels.py executes machine code: what it counts of a kernel is what one counts by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOKENS, HEADS, DIM, CHUNK = 32768, 16, 64, 64


def test_counts_of_a_scan_without_decay(tmp_path: Path) -> None:
    """Bytes, products and programs of the four runs of ``diag_scan_kernel`` at H = 16, K = V = 64, 2k tokens."""
    program, found = ROOT / "benchmarks" / "predict_kernels.py", tmp_path / "found.json"
    command = [sys.executable, str(program), "--families", "linear", "--shapes", "64", "--json", str(found)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = json.loads(found.read_text())["linear 64"]
    assert [(row["kernel"], row["is_backward"], row["programs"]) for row in rows] == [
        ("diag_scan_kernel", n > 0, 16 * HEADS) for n in range(4)
    ]
    tensor = 2 * TOKENS * HEADS * DIM
    least = 4 * tensor / 3.02e12 * 1e3  # three are read, one is written
    state = 4 * 16 * HEADS * DIM * DIM / 3.02e12 * 1e3
    for row in rows:
        assert least * 0.999 < row["ms"]["bytes"] < (least + state) * 1.001, row["ms"]
    multiplied = 4 * TOKENS * HEADS * CHUNK * DIM  # q k^T, scores v, q S, k^T v
    expected = multiplied / 2048 / 132 / 1.755e9 * 1e3
    assert all(abs(row["ms"]["tensor"] / expected - 1) < 1e-3 for row in rows), (expected, rows)
    assert all(row["estimate"] >= row["ms"]["bytes"] for row in rows)

"""The fused kernels compile without a GPU, for Hopper without spills, and fit shared memory: a few of the table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from compiled_kernels import ROOT, compiled


def test_fits_an_h100(tmp_path: Path) -> None:
    calls = "--kinds", "scalar", "vector", "--dims", "128x128", "--dtypes", "bfloat16"
    around: tuple[str, ...] = "rotate_heads", "log_decay_of", "bounded_decay_of", "adam_"
    around += "lerp_tokens", "edit_keys", "gated_group_norm", "grouped_weight_grad_"
    rows = compiled(tmp_path, "--ops", "diag_decay", "diag_decay_segment", *around, *calls)
    assert len(rows) >= 15 and all(row["registers"] > 16 and row["resident"] >= 1 for row in rows)
    assert all(row["spilled"] == 0 and row["shared"] <= 227 * 1024 for row in rows)
    scans = {"diag_scan_kernel", "diag_scaled_scan_kernel", "diag_scale_kernel", "diag_combine_kernel"}
    segments = {"segment_local_kernel", "segment_after_kernel", "segment_gradient_kernel"}
    single = {"rotate_kernel", "adam_kernel", "grouped_weight_grad_kernel"}
    assert scans | segments | single <= {row["kernel"] for row in rows}
    assert sum(row["call"].startswith("log_decay_of") for row in rows) == 8
    assert sum(row["call"].startswith("bounded_decay_of") for row in rows) == 2
    assert sum(row["call"].startswith(around[4:]) for row in rows) == 14


def test_fits_an_rtx_4090(tmp_path: Path) -> None:
    """The widest memories: with the blocks of an H100 a program would ask for 140 KiB of its 99, and be refused."""
    calls = "--arch", "89", "--kinds", "vector", "--dims", "256x256", "--dtypes", "bfloat16"
    rows = compiled(tmp_path, "--ops", "delta_rule", "diag_decay", *calls, may_spill=True)
    assert len(rows) >= 10 and all(row["shared"] <= 99 * 1024 for row in rows), rows
    assert all(row["spilled"] <= 1024 for row in rows), rows


def test_single_precision_fits_an_rtx_4090(tmp_path: Path) -> None:
    """Without tensor cores: with the chunks of an H100 a program would ask for 122 KiB, and spill 10 KB a thread."""
    calls = "--arch", "89", "--kinds", "none", "--dims", "256x256", "--dtypes", "float32"
    rows = compiled(tmp_path, "--ops", "delta_rule", *calls, may_spill=True)
    assert len(rows) >= 5 and all(row["shared"] <= 99 * 1024 for row in rows), rows
    assert all(row["spilled"] <= 1024 for row in rows), rows


def test_finds_a_product_that_is_transposed_in_registers() -> None:
    """Not one that was only reshaped: Triton stores that in order."""
    stored = "  %t = ttg.local_alloc %x : (tensor<64x32xbf16, #linear1>) -> !ttg.memdesc<64x32xbf16, #shared>"
    layout = "#linear1 = #ttg.linear<{{register = [[{}], [8, 0], [0, 8]], lane = [[0, 2]]}}>\n"
    program = "import sys, compile_check; print(*[compile_check._miscompiled(x) for x in sys.argv[1:]])"
    command = [sys.executable, "-c", program, *(layout.format(step) + stored for step in ("1, 0", "0, 1"))]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert run.stdout.split() == ["1", "0"], run.stdout + run.stderr

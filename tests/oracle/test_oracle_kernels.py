"""Layers of flash-linear-attention with their Triton kernels give what they give with the library's naive functions.

So the comparison of our mixers with the latter (``test_oracle_fla.py``) is one with the library as people run it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.oracle.exchange import errors, theirs
from tests.oracle.test_oracle_fla import CASES

FAST = (
    "linear_attention-elu",
    "linear_attention-normalized",
    "lightning_attention",
    "retention",
    "gla-conv",
    "hgrn2-later",
    "mamba2",
    "based-parallel",
    "rebased-parallel",
    "gated_deltanet-negative",
)
SLOW = ("gsa", "kda", "rwkv6", "rwkv7-later", "mom_gated_deltanet")
"""From 5 to 30 seconds each; with LINEAR_MOE_ALL_KERNELS=1 only. DeltaNet's operator takes no float32."""
INTERPRETED = (*FAST, *SLOW) if os.environ.get("LINEAR_MOE_ALL_KERNELS") else FAST

TOLERANCE = {"rwkv7-later": 2e-3}
"""RWKV7's kernel for bounded decays inverts its matrices in float16."""


def test_kernels(tmp_path: Path):
    results = tmp_path / "results.pt"
    command = [sys.executable, "-m", "tests.oracle.interpreted", str(results), *INTERPRETED]
    on_cpu = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}  # with fla, hidden otherwise
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], env=on_cpu, timeout=300)
    found = torch.load(results)
    for name in INTERPRETED:
        wrong = errors(found[name], theirs(CASES[name]))
        assert all(error <= TOLERANCE.get(name, 1e-5) for error in wrong.values()), (name, wrong)

"""Every fused kernel in its place: a whole model, interpreted, has the losses and gradients of chunked torch.

The kernels themselves are judged against their definitions in tests/kernels; here is how they are called.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_a_model_of_fused_kernels_trains_as_one_of_torch() -> None:
    command = [
        sys.executable,
        str(Path(__file__).with_name("fused_model.py")),
        "gated_deltanet",
        "gla",
        "mom_gla",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    loss, gradient = json.loads(run.stdout.splitlines()[-1])
    assert loss <= 1e-5 and gradient <= 1e-4

"""Kernels are compiled once, whatever the lengths and the number of packed documents: it takes seconds each."""

import json
import subprocess
import sys
from pathlib import Path


def test_other_documents_compile_nothing_new() -> None:
    """Of every operation, forward and backward, in bfloat16."""
    program = Path(__file__).with_name("packed_launches.py")
    run = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    found = dict(json.loads(line) for line in run.stdout.splitlines())
    assert len(found) == 28 and all(found.values()), "every operation launches a kernel"
    assert sum(before for before, _ in found["diag_decay scalar"].values()) == 11, "as docs/kernels.md says"
    grown = {
        f"{call}: {kernel}": counts
        for call, kernels in found.items()
        for kernel, counts in kernels.items()
        if counts[0] != counts[1]
    }
    assert not grown, grown

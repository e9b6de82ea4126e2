"""The script from the first line to the last, on CPU: a run of two processes, resumed; and a run that fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "linear_moe_qwen2" / "run_pretrain_qwen.sh"

TINY = {
    "MODEL_SIZE": "tiny",
    "LAYER_TYPE_LIST": "LLLN",
    "SEQ_LEN": "32",
    "BATCH_SIZE": "2",
    "GLOBAL_BATCH_SIZE": "4",
    "PR": "fp32",
    "LR": "1e-2",
    "EVAL_ITERS": "0",
    "GPUS_PER_NODE": "2",
    "RUN_NAME": "tiny",
}


def run(folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """The script with a tiny model, in an otherwise empty environment."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.environ["PYTHONPATH"],
        "OUTPUT_BASEPATH": str(folder),
        **TINY,
        **variables,
    }
    return subprocess.run(["sh", str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=500)


def losses(folder: Path) -> dict[int, float]:
    steps = [json.loads(line) for line in (folder / "tiny" / "metrics.jsonl").read_text().splitlines()]
    return {step["iteration"]: step["lm_loss"] for step in steps}


@pytest.mark.slow
def test_train_then_resume(tmp_path: Path):
    first = run(tmp_path, TRAIN_ITERS="2", WARMUP_ITERS="0")
    assert first.returncode == 0, first.stdout + first.stderr
    head, _, progress = first.stdout.partition("\n\n")
    assert "2 CPU process(es) = TP 1 x PP 1 x CP 1 x DP 2" in head
    steps = [line for line in progress.splitlines() if line.startswith("step")]
    assert len(steps) == 2 and "loss 6.9" in steps[0], "about ln 1024 at first"
    assert "num_layers" not in first.stdout, "Megatron's own lines are for the log"
    run_dir = tmp_path / "tiny"
    (log,) = (run_dir / "log").iterdir()
    assert "num_layers" in log.read_text() and "--layer-kinds" in log.read_text()
    assert {"config.json", "metrics.jsonl", "checkpoint", "tensorboard"} <= {
        path.name for path in run_dir.iterdir()
    }

    again = run(tmp_path, TRAIN_ITERS="4", WARMUP_ITERS="0", GPUS_PER_NODE="1")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resumed at step 2 of 4" in again.stdout
    assert "successfully loaded checkpoint" in again.stdout and "at iteration 2" in again.stdout
    assert list(losses(tmp_path)) == [1, 2, 3, 4], "step 3 follows step 2, in one file"

    other = run(tmp_path, TRAIN_ITERS="4", LAYER_TYPE_LIST="LNLN")
    assert other.returncode == 2
    assert "layer_kinds: gated_deltanet,gated_deltanet,gated_deltanet,softmax -> " in other.stderr


@pytest.mark.slow
def test_a_run_that_fails_says_why_and_passes_its_code_on(tmp_path: Path):
    done = run(tmp_path, TRAIN_ITERS="1", EXTRA_ARGS="--no-such-flag", GPUS_PER_NODE="1")
    assert done.returncode == 1
    assert "unrecognized arguments: --no-such-flag" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        "linear_moe: the run ended with exit code 1; all of its output is in "
    )

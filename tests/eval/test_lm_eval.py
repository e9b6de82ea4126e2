"""The published harness scores an exported model the same at every batch size, called plainly and by our script.

Needs lm_eval, which is optional (``pip install 'lm-eval[hf]'``); what our script does without it is in
``test_evaluation_script.py``.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.eval.tiny_folder import write_model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed"
)

TASKS = Path(__file__).parent / "tasks"
SCRIPT = Path(__file__).parents[2] / "eval" / "lm_eval_linear_moe.sh"
NAMES = "tiny_choice,tiny_text,tiny_answer"


@pytest.fixture(scope="module")
def model(tmp_path_factory, _pool):
    folder = tmp_path_factory.mktemp("evaluated") / "tiny"
    _pool.run(1, write_model, folder)
    return folder


def harness(command: list[str], out: Path, **variables: str) -> tuple[dict, list]:
    """Results by task, and what the model wrote."""
    environment = {"HF_HOME": str(out.parent / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    done = subprocess.run(
        command, env=os.environ | environment, cwd=TASKS, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
    lines = next(out.rglob("samples_tiny_answer_*.jsonl")).read_text().splitlines()
    return results, [json.loads(line)["resps"] for line in lines]


def test_scores_are_the_same_at_every_batch_size_and_on_both_paths(model, tmp_path):
    arguments = f"pretrained={model},trust_remote_code=True,dtype=float32,max_length=256"
    options = ["--tasks", NAMES, "--include_path", str(TASKS), "--log_samples", "--output_path"]
    plain = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", arguments, *options]
    one, wrote_one = harness([*plain, str(tmp_path / "one"), "--batch_size", "1"], tmp_path / "one")
    script = {"PYTHON": sys.executable, "TASKS": NAMES, "TASK_PATH": str(TASKS), "BATCH_SIZE": "16"}
    script |= {"OUTPUT_PATH": str(tmp_path / "many"), "EXTRA_ARGS": "--log_samples", "MAX_LENGTH": "256"}
    path = tmp_path / "it's tiny, [1,2"  # of name=value, lm_eval would take the characters for its own
    path.symlink_to(model)
    many, wrote_many = harness(["sh", str(SCRIPT), str(path)], tmp_path / "many", **script)
    assert {task: printed(values) for task, values in one.items()} == {
        task: printed(values) for task, values in many.items()
    }
    assert wrote_one == wrote_many
    assert len({str(answer) for answer in wrote_one}) > 3, "the model writes one thing"
    assert 0 < one["tiny_choice"]["acc,none"] < 1


def printed(values: dict) -> dict:
    """As the harness prints them."""
    return {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in values.items()}

"""Plans and error messages from a few variables, without touching the real environment."""

from pathlib import Path
from typing import Any

import pytest

from linear_moe.launch.cluster import with_cluster
from linear_moe.launch.environment import read_environment
from linear_moe.launch.plan import RunPlan, plan_run
from linear_moe.launch.preflight import preflight

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = {
    "qwen2": EXAMPLES / "linear_moe_qwen2" / "run_pretrain_qwen.sh",
    "qwen3_next": EXAMPLES / "linear_moe_qwen3_next" / "run_pretrain_qwen3_next.sh",
    "deepseek_v2": EXAMPLES / "linear_moe_deepseek_v2" / "run_pretrain_deepseek.sh",
    "mixtral": EXAMPLES / "linear_moe_mixtral" / "run_pretrain_mistral.sh",
    "llama3": EXAMPLES / "linear_llama3" / "run_pretrain_mcore_llama.sh",
    "mamba2": EXAMPLES / "linear_mamba2" / "run_pretrain_mamba2.sh",
}
"""The run script of every family."""

SMALL = {
    "MODEL_SIZE": "tiny",
    "SEQ_LEN": "128",
    "TRAIN_ITERS": "10",
    "OUTPUT_BASEPATH": "/nonexistent-base/..",
}


def make_plan(cuda: int = 0, *, family: str = "qwen2", **variables: str) -> RunPlan:
    """The plan of a tiny run with these variables, on a machine with `cuda` devices; not checked."""
    return plan_run(read_environment(with_cluster({**SMALL, **variables}), family), cuda)


def message(cuda: int = 0, *, family: str = "qwen2", **variables: str) -> str:
    """The error of a run with these variables; empty when there is none."""
    try:
        preflight(make_plan(cuda, family=family, **variables))
    except ValueError as error:
        return str(error)
    return ""


def case(name: str, text: str, cuda: int = 0, **variables: str) -> Any:
    """A mistake: its name, the whole message, the devices of the machine, and the variables."""
    return pytest.param(cuda, variables, text, id=name)

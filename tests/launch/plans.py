"""Plans and error messages from a few variables, without touching the real environment."""

from linear_moe.launch.cluster import with_cluster
from linear_moe.launch.environment import read_environment
from linear_moe.launch.errors import PreflightError
from linear_moe.launch.plan import RunPlan, plan_run
from linear_moe.launch.preflight import preflight

SMALL = {
    "MODEL_SIZE": "tiny",
    "SEQ_LEN": "128",
    "TRAIN_ITERS": "10",
    "OUTPUT_BASEPATH": "/nonexistent-base/..",
}


def make_plan(cuda: int = 0, **variables: str) -> RunPlan:
    """The plan of a tiny run with these variables, on a machine with `cuda` devices; not checked."""
    return plan_run(read_environment(with_cluster({**SMALL, **variables}), "qwen2"), cuda)


def message(cuda: int = 0, **variables: str) -> str:
    """The error of a run with these variables; empty when there is none."""
    try:
        preflight(make_plan(cuda, **variables))
    except PreflightError as error:
        return str(error)
    return ""

"""What the machine says about a run: SLURM's variables, CUDA devices, CPU cores. Without torch, to stay fast."""

import ctypes
import os
import re
from collections.abc import Mapping

from linear_moe.launch.errors import PreflightError

RETIRED = {
    "FL": "softmax layers pick flash attention by themselves",
    "FU": "Transformer Engine picks its own attention kernel; EXTRA_ARGS='--attention-backend fused' forces one",
    "MB": "MegaBlocks is gone: USE_GEMM=true is the fast path, and works with the distributed optimizer",
    "PAD_LEN": "SEQ_LEN is the length; finetuning pads the end of a sequence only",
    "EVAL_CAPACITY_FACTOR": "evaluation uses TRAIN_CAPACITY_FACTOR",
    "LA_MODE": "the kernel is chosen for the device; the results are the same",
    "SLW": "no layer has a sliding window",
    "SLIDING_WINDOW": "no layer has a sliding window",
    "MAX_WINDOW_LAYERS": "no layer has a sliding window",
}
"""Variables of the earlier system's scripts that no longer do anything -> what replaces them."""


def retired_variables(environment: Mapping[str, str]) -> list[str]:
    """One line for each variable that is set but does nothing here."""
    return [f"{name} does nothing: {instead}." for name, instead in RETIRED.items() if environment.get(name)]


def with_cluster(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT filled in from the cluster, where not set.

    Knows `srun` (one task per node) and the container service of the earlier scripts (ENV=dlc). Raises PreflightError
    when SLURM or torchrun started several tasks on a node, or when a job of several nodes would be as many runs.
    """
    found: dict[str, str] = {}
    if environment.get("ENV") == "dlc":
        names = {
            "NNODES": "WORLD_SIZE",
            "NODE_RANK": "RANK",
            "GPUS_PER_NODE": "KUBERNETES_CONTAINER_RESOURCE_GPU",
        }
        found = {ours: environment[theirs] for ours, theirs in names.items() if environment.get(theirs)}
    elif environment.get("SLURM_PROCID") and not environment.get("NNODES"):
        found = _from_slurm(environment)
    else:
        _refuse_one_of_many(environment)
    return {**environment, **{name: value for name, value in found.items() if not environment.get(name)}}


def _refuse_one_of_many(environment: Mapping[str, str]) -> None:
    """Each process of torchrun, or pod of a PyTorchJob, would train the whole run by itself, without the others."""
    size = environment.get("WORLD_SIZE", "")
    if environment.get("NNODES") or not environment.get("MASTER_ADDR") or not size.isdigit() or int(size) < 2:
        return
    rank = environment.get("RANK", "?")
    if environment.get("LOCAL_RANK"):
        raise PreflightError(
            f"this script was started as process {rank} of {size} (RANK, WORLD_SIZE).",
            "it starts the processes of its node itself, with torchrun.",
            "sh <this script> without torchrun, once on each node",
        )
    raise PreflightError(
        f"WORLD_SIZE={size} and RANK={rank} speak of other nodes, and NNODES of none.",
        "each node would train a run of its own; a service sets the former, of its pods or of all their processes.",
        f"NNODES=<number of nodes> NODE_RANK={rank} (one start on each), or NNODES=1 to use this node alone",
    )


def _from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    if not environment.get("SLURM_STEP_ID"):  # inside sbatch or salloc, but not started by srun
        nodes = environment.get("SLURM_JOB_NUM_NODES", "1")
        if nodes != "1":
            raise PreflightError(
                f"this SLURM job has {nodes} nodes, but the script runs on the first one only.",
                "one copy of the script has to run on each node, and `srun` is what starts it there.",
                "srun --ntasks-per-node=1 sh <this script>, or NNODES=1 to use this node alone",
            )
        return {}
    nodes = environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_JOB_NUM_NODES") or "1"
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or nodes
    if tasks != nodes:
        raise PreflightError(
            f"srun started {tasks} tasks on {nodes} node(s).",
            "the script starts the processes of its node itself, GPUS_PER_NODE of them.",
            "srun --ntasks-per-node=1 sh <this script>",
        )
    found = {"NNODES": nodes, "NODE_RANK": environment.get("SLURM_NODEID", "0")}
    node_list = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if node_list:
        found["MASTER_ADDR"] = first_node(node_list)
    if environment.get("SLURM_JOB_ID", "").isdigit():
        # Two jobs on one node must not meet; the port has to be the same on every node.
        found["MASTER_PORT"] = str(20_000 + int(environment["SLURM_JOB_ID"]) % 20_000)
    return found


def first_node(node_list: str) -> str:
    """First host of SLURM's compressed list: `gpu[003-006,010],login1` -> `gpu003`."""
    first_of_each = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", node_list)
    return first_of_each.split(",")[0]


def cuda_device_count() -> int:
    """CUDA devices this process may use (CUDA_VISIBLE_DEVICES counts); 0 without a driver. Creates no CUDA context."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def cpu_cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0))

"""Every mistake a run's variables can hold, found before any process group, directory or file is created.

Each `check_*` takes the plan and raises PreflightError; they run in the order in which one explains the next.
"""

from collections.abc import Callable

from linear_moe.launch.check_files import check_data, check_output
from linear_moe.launch.check_layout import (
    check_batch,
    check_devices,
    check_experts,
    check_heads,
    check_nodes,
    check_pipeline,
    check_routing,
    check_schedule,
    check_sequence,
    check_world,
)
from linear_moe.launch.check_mixers import check_mixers
from linear_moe.launch.errors import PreflightError
from linear_moe.launch.hugging_face import check_hugging_face
from linear_moe.launch.plan import RunPlan, mixer_prefixes
from linear_moe.launch.resume import check_resume

# Flags that a variable sets: a second opinion in EXTRA_ARGS would pass every check and then win.
_FLAG_OF_VARIABLE = {
    "--tensor-model-parallel-size": "TP",
    "--pipeline-model-parallel-size": "PP",
    "--num-virtual-stages-per-pipeline-rank": "VPP",
    "--num-layers-per-virtual-pipeline-stage": "VPP",
    "--context-parallel-size": "CP",
    "--expert-model-parallel-size": "EP",
    "--expert-tensor-parallel-size": "ETP",
    "--sequence-parallel": "SP",
    "--seq-length": "SEQ_LEN",
    "--micro-batch-size": "BATCH_SIZE",
    "--global-batch-size": "GLOBAL_BATCH_SIZE",
    "--train-iters": "TRAIN_ITERS",
    "--train-samples": "TRAIN_ITERS",
    "--data-path": "DATASET_PATH",
    "--tokenizer-type": "TOKENIZER",
    "--tokenizer-model": "TOKENIZER",
    "--vocab-size": "VOCAB_SIZE",
    "--save": "RUN_NAME",
    "--load": "RUN_NAME",
    "--layer-kinds": "LAYER_TYPE_LIST",
    "--hybrid-override-pattern": "HYBRID_OVERRIDE_PATTERN",
    "--bf16": "PR",
    "--fp16": "PR",
}


def check_extra_args(plan: RunPlan) -> None:
    """EXTRA_ARGS does not set what a variable sets."""
    for word in plan.extra_args:
        flag = word.partition("=")[0]
        if flag in _FLAG_OF_VARIABLE:
            raise PreflightError(
                f"EXTRA_ARGS holds {flag}, which {_FLAG_OF_VARIABLE[flag]} sets.",
                "the checks before the start read the variables; a second value would get past them.",
                f"{_FLAG_OF_VARIABLE[flag]}=...",
            )


def check_mixer_options(plan: RunPlan) -> None:
    """EXTRA_ARGS holds no option of a mixer that no layer has (`--la-*`, of any mixer: `check_mixers`)."""
    prefixes = mixer_prefixes(plan.settings.mixer_modules)
    for word in plan.extra_args:
        flag = word.partition("=")[0]
        owner = max((prefix for prefix in prefixes if flag.startswith(prefix)), key=len, default=None)
        if owner is not None and prefixes[owner] not in plan.kinds:
            here = next((prefix for prefix, name in prefixes.items() if name in plan.kinds), None)
            raise PreflightError(
                f"EXTRA_ARGS holds {flag}, but no layer is {prefixes[owner]}.",
                f"the layers are {', '.join(dict.fromkeys(plan.kinds))}; the option would change nothing.",
                "leave it out"
                + (f", or {flag.replace(owner, here)} if there is such an option" if here else ""),
            )


CHECKS: tuple[Callable[[RunPlan], None], ...] = (
    check_extra_args,
    check_mixer_options,
    check_devices,
    check_nodes,
    check_heads,
    check_pipeline,
    check_sequence,
    check_experts,
    check_routing,
    check_world,
    check_batch,
    check_schedule,
    check_data,
    check_resume,
    check_hugging_face,
    check_output,
    check_mixers,
)


def preflight(plan: RunPlan) -> None:
    """Run every check; raises the first PreflightError."""
    for check in CHECKS:
        check(plan)

"""Every mistake a run's variables can hold, found before any process group, directory or file is created.

Each `check_*` takes the plan and raises ValueError; they run in the order in which one explains the next.
"""

import ast
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from linear_moe.launch.check_files import check_data, check_output, check_run_name
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
from linear_moe.launch.check_size import check_attention
from linear_moe.launch.errors import PreflightError
from linear_moe.launch.hugging_face import check_hugging_face
from linear_moe.launch.plan import RunPlan, mixer_prefixes
from linear_moe.launch.resume import check_resume

# Flags that a variable sets: a second opinion in EXTRA_ARGS would pass every check and then win.
_FLAGS_OF_VARIABLE = {
    "TP": "--tensor-model-parallel-size",
    "PP": "--pipeline-model-parallel-size",
    "VPP": "--num-virtual-stages-per-pipeline-rank --num-layers-per-virtual-pipeline-stage",
    "CP": "--context-parallel-size",
    "EP": "--expert-model-parallel-size",
    "ETP": "--expert-tensor-parallel-size",
    "SP": "--sequence-parallel",
    "DO": "--use-distributed-optimizer",
    "SEQ_LEN": "--seq-length",
    "BATCH_SIZE": "--micro-batch-size",
    "GLOBAL_BATCH_SIZE": "--global-batch-size",
    "LR": "--lr",
    "MIN_LR": "--min-lr",
    "PR": "--bf16 --fp16",
    "SEED": "--seed",
    "TRAIN_ITERS": "--train-iters --train-samples",
    "WARMUP_ITERS": "--lr-warmup-iters --lr-warmup-samples --lr-warmup-fraction",
    "SAVE_INTERVAL": "--save-interval",
    "EVAL_INTERVAL": "--eval-interval",
    "EVAL_ITERS": "--eval-iters",
    "LOG_INTERVAL": "--log-interval",
    "DATASET_PATH": "--data-path --mock-data",
    "TOKENIZER": "--tokenizer-type --tokenizer-model",
    "VOCAB_SIZE": "--vocab-size",
    "EXTRA_VOCAB_SIZE": "--padded-vocab-size",
    "PACK": "--dataloader-inter-document-masking",
    "LAYER_TYPE_LIST": "--layer-kinds --layer-type-list",
    "HYBRID_OVERRIDE_PATTERN": "--hybrid-override-pattern",
    "LA_MODULE": "--la-module",
    "MIXER_MODULES": "--mixer-module",
    "MODEL_SIZE": "--model-size",
    "MOE_AUX_LOSS_COEFF": "--moe-aux-loss-coeff",
    "AC": "--recompute-granularity --recompute-method --recompute-num-layers",
    "TE": "--transformer-impl",
    "USE_GEMM": "--sequential-experts",
    "TOKEN_DROPPING=true TRAIN_CAPACITY_FACTOR": "--moe-expert-capacity-factor",
    "PRETRAIN_CHECKPOINT_PATH": "--pretrained-checkpoint",
    "RUN_NAME": "--save --load --run-dir",
}
_VARIABLE_OF_FLAG = {flag: name for name, flags in _FLAGS_OF_VARIABLE.items() for flag in flags.split()}


def check_extra_args(plan: RunPlan) -> None:
    """EXTRA_ARGS does not set what a variable sets."""
    for word in plan.extra_args:
        flag = word.partition("=")[0]
        if flag in _VARIABLE_OF_FLAG:
            name = _VARIABLE_OF_FLAG[flag]
            raise PreflightError(
                f"EXTRA_ARGS holds {flag}, which {name.split('=')[0]} sets.",
                "the checks before the start read the variables; a second value would get past them.",
                f"{name}=...",
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


def check_kernels(environment: Mapping[str, str]) -> None:
    """LINEAR_MOE_KERNELS names a backend, which the trainer would ask for ten seconds later."""
    name, names = environment.get("LINEAR_MOE_KERNELS"), kernel_backends()
    if name and name not in names:
        raise PreflightError(
            f"LINEAR_MOE_KERNELS={name} names no backend.",
            f"the backends are {', '.join(names)}.",
            f"LINEAR_MOE_KERNELS= (empty), or LINEAR_MOE_KERNELS={names[0]}",
        )


def kernel_backends() -> tuple[str, ...]:
    """`linear_moe.kernels.dispatch.NAMES`, read from the source: importing it would import torch."""
    source = Path(__file__).parent.parent / "kernels" / "dispatch.py"
    found = re.search(r"^NAMES = (.*)$", source.read_text(), re.MULTILINE)
    assert found is not None, source
    names: tuple[str, ...] = ast.literal_eval(found[1])
    return names


CHECKS: tuple[Callable[[RunPlan], None], ...] = (
    check_run_name,
    check_extra_args,
    check_mixer_options,
    check_devices,
    check_nodes,
    check_attention,
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
    """Run every check; ValueError for the first mistake."""
    for check in CHECKS:
        check(plan)

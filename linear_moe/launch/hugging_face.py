"""PRETRAIN_CHECKPOINT_PATH as a Hugging Face folder: what its model is, and its conversion, once, into the run.

The folder is read as the run that it will become, `RUN/pretrained`, so that everything else takes it for one.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from linear_moe.checkpoint.hf_config import SOURCE_FILE, describe_folder, weight_files
from linear_moe.checkpoint.options import linear_options, model_arguments
from linear_moe.data.tokenizer import TokenizerError, describe_tokenizer
from linear_moe.launch.errors import PreflightError
from linear_moe.launch.plan import RunPlan, registered_mixers
from linear_moe.launch.resume import (
    UNSET,
    architecture,
    architecture_of,
    checkpoint_iteration,
    mixer_options,
    refuse_differences,
)
from linear_moe.model.families import padded_vocab_size
from linear_moe.model.pattern import layer_kinds

LOOK_EVERY_S = 2
PATIENCE_S = 60
"""Nodes may start so far apart, and the first one may be about to try again."""

_PATTERN = ("LAYER_TYPE_LIST", "LA_MODULE", "HYBRID_OVERRIDE_PATTERN")


def future_config(folder: Path, given: Mapping[str, str]) -> dict[str, Any]:
    """`config.json` of the run that a Hugging Face folder becomes, with the pattern of the variables.

    Raises ValueError for a model that cannot be imported.
    """
    described = describe_folder(folder)
    kinds = described.kinds
    pattern, module, hybrid = (given.get(name) for name in _PATTERN)
    if pattern or module or hybrid:
        known = registered_mixers(given.get("MIXER_MODULES"))
        kinds = layer_kinds(pattern, module, described.size.num_layers, hybrid, known=known)
    arguments = model_arguments(described, kinds)
    if set(kinds) != set(described.kinds):
        from linear_moe.lsm.registry import import_mixers  # torch, for this alone

        import_mixers(given.get("MIXER_MODULES", ""))
        arguments += linear_options(set(kinds) - set(described.kinds), given.get("EXTRA_ARGS", "").split())
    rows = padded_vocab_size(described.size.vocab_size)
    architecture: dict[str, Any] = {"family": described.family.name, "model_size": described.size_name}
    architecture |= {"layer_kinds": list(kinds), "padded_vocab_size": rows}
    config = {"architecture": architecture, "arguments": arguments, "vocab_size": described.size.vocab_size}
    try:
        describe_tokenizer(str(folder))
    except TokenizerError:
        return config
    tokenizer = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder)}
    return config | {"tokenizer": tokenizer}


def check_hugging_face(plan: RunPlan) -> None:
    """What the variables say of the model is what the folder says that the run starts from."""
    source = plan.hugging_face
    if source is None or checkpoint_iteration(plan.run_dir / "checkpoint") is not None:
        return
    described = describe_folder(source)
    arguments = model_arguments(described, described.kinds)
    theirs = architecture_of(described.family.name, described.size, arguments)
    theirs["padded_vocab_size"] = padded_vocab_size(described.size.vocab_size)
    ours = {name: value for name, value in architecture(plan).items() if name in theirs}
    given = f"PRETRAIN_CHECKPOINT_PATH={plan.settings.pretrain_checkpoint_path}"
    refuse_differences(theirs, ours, f"{given} has another architecture", UNSET)
    _check_source(source, plan.run_dir / "pretrained")


def _check_source(source: Path, target: Path) -> None:
    """What an earlier start has converted is this folder: another of the same sizes would pass every other check."""
    try:
        made_of = json.loads((target / SOURCE_FILE).read_text())
    except FileNotFoundError:
        return  # nothing is converted yet, or by an earlier version
    if made_of["weights"] != weight_files(source):
        raise PreflightError(
            f"{target} was made from {made_of['folder']}, and PRETRAIN_CHECKPOINT_PATH={source} has other files.",
            "the run would start from weights that are not these.",
            f"another RUN_NAME, or rm -r {shlex.quote(str(target))} to convert again",
        )


def convert(plan: RunPlan, announce: Callable[[str], None]) -> bool:
    """Make `RUN/pretrained` where it is needed and not there yet; whether all is well.

    On many nodes the first one converts and the others wait: they share the disk of the run.
    """
    source = plan.hugging_face
    target = plan.run_dir / "pretrained"
    if source is None or checkpoint_iteration(plan.run_dir / "checkpoint") is not None:
        return True
    if checkpoint_iteration(target / "checkpoint") is not None:
        announce(f"PRETRAIN_CHECKPOINT_PATH={source} was converted before, into {target}")
        return True
    doing = (
        "converting it once, into" if plan.settings.node_rank == 0 else "waiting for the first node to make"
    )
    announce(f"PRETRAIN_CHECKPOINT_PATH={source} is a Hugging Face folder: {doing} {target}")
    failed = plan.run_dir / "pretrained.failed"
    if plan.settings.node_rank > 0:
        return _is_made(target, failed, announce)
    failed.unlink(missing_ok=True)
    is_made = subprocess.run(import_command(plan, source, target), check=False).returncode == 0
    if not is_made and plan.settings.nnodes > 1:
        failed.touch()
    return is_made


def _is_made(target: Path, failed: Path, announce: Callable[[str], None]) -> bool:
    """Wait for the first node, which notes a failure, and takes the note of an earlier one away at its start."""
    seen = 0
    while checkpoint_iteration(target / "checkpoint") is None:
        seen = seen + 1 if failed.exists() else 0
        if seen * LOOK_EVERY_S > PATIENCE_S:
            announce(f"the first node could not make {target}: its log says why")
            return False
        time.sleep(LOOK_EVERY_S)
    return True


def import_command(plan: RunPlan, source: Path, target: Path) -> list[str]:
    """The conversion, as a person could type it."""
    options = mixer_options(list(plan.extra_args), plan.settings.mixer_modules)
    words = [word for pair in options.items() for word in pair]
    if plan.settings.mixer_modules:
        words += ["--mixer-module", plan.settings.mixer_modules]
    command = [sys.executable, "-m", "linear_moe.checkpoint", "import", "--hf", str(source)]
    command += ["--save", str(target), "--layer-kinds", ",".join(plan.kinds)]
    return [*command, f"--extra-args={' '.join(words)}"]

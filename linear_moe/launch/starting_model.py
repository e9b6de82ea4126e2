"""The model of a run as the variables and the size that would make it again: what a person need not say twice."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from linear_moe.data.tokenizer import TokenizerError, describe_tokenizer
from linear_moe.launch.environment import RunSettings
from linear_moe.launch.errors import PreflightError
from linear_moe.launch.hugging_face import future_config
from linear_moe.launch.instructions import kept_tokenizer
from linear_moe.launch.plan import NULL_TOKENIZER, hugging_face_folder
from linear_moe.launch.resume import checkpoint_iteration, mixer_options, read_config
from linear_moe.model.families import FAMILIES, Family, flags_of, size_of

SCRIPTS = {
    "qwen2": "linear_moe_qwen2/run_finetune_qwen.sh",
    "qwen3_next": "linear_moe_qwen3_next/run_finetune_qwen3_next.sh",
    "deepseek_v2": "linear_moe_deepseek_v2/run_finetune_deepseek.sh",
    "mixtral": "linear_moe_mixtral/run_finetune_mistral.sh",
    "llama3": "linear_llama3/run_finetune_mcore_llama.sh",
    "mamba2": "linear_mamba2/run_finetune_mamba2.sh",
}
"""Finetuning script of each family, in ``examples``."""


@dataclass(frozen=True)
class StartingModel:
    """What PRETRAIN_CHECKPOINT_PATH says of the model."""

    variables: Mapping[str, str]
    """Variables that the person has not set; and EXTRA_ARGS, theirs behind what the model needs."""
    families: Mapping[str, Family]
    """The tables of the families, with the size of the checkpoint in its own."""

    @property
    def names(self) -> tuple[str, ...]:
        """Variables that are the checkpoint's alone."""
        return tuple(name for name in self.variables if name != "EXTRA_ARGS")


def with_start(given: Mapping[str, str], announce: Callable[[str], None]) -> Mapping[str, str]:
    """``given`` variables; a run that goes on stands for a PRETRAIN_CHECKPOINT_PATH that is not there any more.

    Its own checkpoint has the weights, and its ``config.json`` the model. ``announce`` is told so.
    Raises PreflightError when the path does not exist, and no run goes on.
    """
    start, name = given.get("PRETRAIN_CHECKPOINT_PATH"), given.get("RUN_NAME")
    if start == "none" or (start is not None and Path(start).exists()):
        return given
    output = Path(given.get("OUTPUT_BASEPATH", RunSettings.output_basepath))
    if name is not None and checkpoint_iteration(output / name / "checkpoint") is not None:
        missing = "is not set" if start is None else f"{start} is gone"
        announce(f"PRETRAIN_CHECKPOINT_PATH {missing}: {output / name} goes on from its own checkpoint.")
        return {**given, "PRETRAIN_CHECKPOINT_PATH": str(output / name)}
    if start is None:
        return given
    # Without a name the model would have said which run is meant, and is not there to say it.
    goes_on = f"RUN_NAME=<run in {output}> to go on with one that started there, or " if name is None else ""
    raise PreflightError(
        f"PRETRAIN_CHECKPOINT_PATH={start} does not exist.",
        "a new run starts from the weights there; only one that has saved steps of its own needs them no more.",
        f"{goes_on}a run folder, its checkpoint/, a Hugging Face folder, or none to start from random weights",
    )


def starting_model(given: Mapping[str, str], family: str, task: str = "finetune") -> StartingModel:
    """The model that ``given`` variables start from; nothing of it when there is no ``config.json``.

    ``task`` is finetune or pretrain, as in the names of the scripts.
    Raises PreflightError when it is of another family.
    """
    config = _config(given)
    saved, arguments = config.get("architecture", {}), config.get("arguments", [])
    if saved.get("family", family) != family:
        script = SCRIPTS.get(saved["family"], "*/run_finetune_*.sh").replace("run_finetune", f"run_{task}")
        raise PreflightError(
            f"PRETRAIN_CHECKPOINT_PATH={given['PRETRAIN_CHECKPOINT_PATH']} is a {saved['family']} model.",
            f"this script {task}s {family}.",
            f"sh examples/{script}",
        )
    families = dict(FAMILIES)
    found = _pattern(saved, given) | _tokenizer(config, Path(given["PRETRAIN_CHECKPOINT_PATH"]))
    found["MIXER_MODULES"] = flags_of(arguments).get("--mixer-module", "")
    size = size_of(arguments)
    if size is not None and "MODEL_SIZE" not in given:
        found["MODEL_SIZE"] = saved.get("model_size") or "checkpoint"
        sizes = {**FAMILIES[family].sizes, found["MODEL_SIZE"]: size}
        pre_softmax = "--moe-router-pre-softmax" in arguments if size.is_moe else None
        known = FAMILIES[family]
        before = known.softmax_before_topk if pre_softmax is None else pre_softmax
        families[family] = replace(known, sizes=sizes, old_sizes={}, softmax_before_topk=before)
    tokenizer, rows = given.get("TOKENIZER") or found.get("TOKENIZER"), saved.get("padded_vocab_size")
    if rows and tokenizer and tokenizer != NULL_TOKENIZER:
        found |= _rows(tokenizer, rows)
    elif "vocab_size" in config:
        found["VOCAB_SIZE"] = str(config["vocab_size"])
    elif rows and "VOCAB_SIZE" not in given:
        # Without a saved number, the last row is for the end of a document.
        tokens = int(flags_of(arguments).get("--vocab-size", rows - 1))
        found |= {"VOCAB_SIZE": str(tokens), "EXTRA_VOCAB_SIZE": str(rows - tokens)}
    found = {name: text for name, text in found.items() if text and name not in given}
    options = mixer_options(arguments, given.get("MIXER_MODULES") or found.get("MIXER_MODULES"))
    if options:
        flags = itertools.chain.from_iterable(options.items())
        found["EXTRA_ARGS"] = " ".join([*flags, given.get("EXTRA_ARGS", "")]).strip()
    return StartingModel(found, families)


def _config(given: Mapping[str, str]) -> dict[str, Any]:
    if (source := hugging_face_folder(given["PRETRAIN_CHECKPOINT_PATH"])) is not None:
        return future_config(source, given)
    folder = Path(given["PRETRAIN_CHECKPOINT_PATH"])
    found = map(read_config, (folder, folder.parent))
    return next((config for config in found if "architecture" in config), {})


def _pattern(saved: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str]:
    kinds = saved.get("layer_kinds")
    if not kinds or {"LA_MODULE", "LAYER_TYPE_LIST", "HYBRID_OVERRIDE_PATTERN"} & given.keys():
        return {}
    mixers = [kind for kind in dict.fromkeys(kinds) if kind != "softmax"]
    symbols = dict(zip(mixers, "L" if len(mixers) == 1 else "123456789"))
    pattern = "".join(symbols.get(kind, "N") for kind in kinds)
    return {"LAYER_TYPE_LIST": pattern, "LA_MODULE": ",".join(mixers)}


def _tokenizer(config: Mapping[str, Any], run: Path) -> dict[str, str]:
    tokenizer = config.get("tokenizer", {})
    path = tokenizer.get("tokenizer_model")
    if path and not Path(path).exists():  # the run has moved, or its data have: it keeps a copy
        kept = (kept_tokenizer(folder) for folder in (run, run.parent))
        path = next((str(folder) for folder in kept if folder.exists()), path)
    return {"TOKENIZER": path} if path and tokenizer.get("tokenizer_type") == "HuggingFaceTokenizer" else {}


def _rows(tokenizer: str, rows: int) -> dict[str, str]:
    try:
        return {"EXTRA_VOCAB_SIZE": str(max(rows - describe_tokenizer(tokenizer).base_vocab_size, 0))}
    except TokenizerError:
        return {}  # reported when it is used

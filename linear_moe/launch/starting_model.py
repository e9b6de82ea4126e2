"""The model of a run as the variables that would make it again: what a person need not say twice."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linear_moe.data.tokenizer import TokenizerError, describe_tokenizer
from linear_moe.launch.errors import PreflightError
from linear_moe.launch.plan import registered_mixers
from linear_moe.launch.resume import mixer_options, read_config
from linear_moe.model.families import FAMILIES, SIZE_FLAGS, ModelSize


def model_variables(given: Mapping[str, str], family: str) -> dict[str, str]:
    """Variables of the model in PRETRAIN_CHECKPOINT_PATH that are not ``given``; none when it tells nothing.

    EXTRA_ARGS is among them even so: what is given, behind what the model needs.

    Raises PreflightError when it is of another family.
    """
    config = _config(given["PRETRAIN_CHECKPOINT_PATH"])
    if not config:
        return {}
    saved, arguments = config.get("architecture", {}), config.get("arguments", [])
    if saved.get("family", family) != family:
        raise PreflightError(
            f"PRETRAIN_CHECKPOINT_PATH={given['PRETRAIN_CHECKPOINT_PATH']} is a {saved['family']} model.",
            f"this script finetunes {family}.",
            f"the run_finetune script of {saved['family']}",
        )
    found = _pattern(saved, given) | _tokenizer(config)
    found["MIXER_MODULES"] = _value(arguments, "--mixer-module") or ""
    table = FAMILIES[family]
    named = given.get("MODEL_SIZE") or saved.get("model_size") or ""
    named = table.old_sizes.get(named, named)
    found["MODEL_SIZE"] = named if named in table.sizes else table.default_size
    size, has_experts = table.sizes[found["MODEL_SIZE"]], saved.get("num_experts") is not None
    if size.is_moe != has_experts:
        found["MOE"] = str(has_experts).lower()
    tokenizer, rows = given.get("TOKENIZER") or found.get("TOKENIZER"), saved.get("padded_vocab_size")
    if rows and tokenizer:
        found |= _rows(tokenizer, rows)
    found = {name: text for name, text in found.items() if text and name not in given}
    modules = given.get("MIXER_MODULES") or found.get("MIXER_MODULES")
    flags = _changes(size.with_moe(has_experts), arguments)
    flags += itertools.chain.from_iterable(mixer_options(arguments, registered_mixers(modules)).items())
    return found | ({"EXTRA_ARGS": " ".join([*flags, given.get("EXTRA_ARGS", "")]).strip()} if flags else {})


def _config(path: str) -> dict[str, Any]:
    folder = Path(path)
    return next(filter(None, map(read_config, (folder, folder.parent))), {})


def _pattern(saved: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str]:
    kinds = saved.get("layer_kinds")
    if not kinds or {"LA_MODULE", "LAYER_TYPE_LIST", "HYBRID_OVERRIDE_PATTERN"} & given.keys():
        return {}
    mixers = [kind for kind in dict.fromkeys(kinds) if kind != "softmax"]
    symbols = dict(zip(mixers, "L" if len(mixers) == 1 else "123456789"))
    pattern = "".join(symbols.get(kind, "N") for kind in kinds)
    return {"LAYER_TYPE_LIST": pattern} | ({"LA_MODULE": ",".join(mixers)} if mixers else {})


def _tokenizer(config: Mapping[str, Any]) -> dict[str, str]:
    tokenizer = config.get("tokenizer", {})
    path = tokenizer.get("tokenizer_model")
    return {"TOKENIZER": path} if path and tokenizer.get("tokenizer_type") == "HuggingFaceTokenizer" else {}


def _rows(tokenizer: str, rows: int) -> dict[str, str]:
    try:
        return {"EXTRA_VOCAB_SIZE": str(max(rows - describe_tokenizer(tokenizer).base_vocab_size, 0))}
    except TokenizerError:
        return {}  # reported when it is used


def _changes(size: ModelSize, arguments: list[str]) -> list[str]:
    """Flags of a command line that differ from the named size."""
    flags: list[str] = []
    for name, flag in SIZE_FLAGS.items():
        value = _value(arguments, flag)
        if value is not None and value != str(getattr(size, name)):
            flags += [flag, value]
    return flags


def _value(arguments: list[str], flag: str) -> str | None:
    return arguments[arguments.index(flag) + 1] if flag in arguments else None

"""Run folder -> Hugging Face: one process, on CPU, one tensor after the other, from a checkpoint of any layout.

A model of softmax layers, or one like Qwen3-Next, gets the class of transformers that computes the same, if there is
one; every other model a folder with its code (``trust_remote_code``). Everything is checked before anything is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from linear_moe.checkpoint import mamba2, qwen3_next, remote
from linear_moe.checkpoint.blueprint import Blueprint, blueprint, family_and_size
from linear_moe.checkpoint.folders import (
    ORIGIN,
    Progress,
    begin,
    check_room,
    copy_tokenizer,
    fingerprint,
    finish,
    refuse_existing,
    run_and_iteration,
    silent,
)
from linear_moe.checkpoint.hf_config import CLASSES, OURS, RUN_FILE, describe
from linear_moe.checkpoint.hf_config import read_config as read_hf_config
from linear_moe.checkpoint.hf_folder import SHARD_BYTES, Planned, shards, write_index, write_shard
from linear_moe.checkpoint.native import KINDS, native_config, native_type
from linear_moe.checkpoint.options import model_arguments
from linear_moe.checkpoint.parts import joined, members, whole_name
from linear_moe.checkpoint.report import differences
from linear_moe.checkpoint.tables import Row, rows
from linear_moe.checkpoint.torch_dist import Reader
from linear_moe.data.tokenizer import TokenizerError, describe_tokenizer
from linear_moe.inference.rebuild import shaping_arguments
from linear_moe.inference.tokenizer import check_given
from linear_moe.model.families import SIZE_FLAGS, ModelSize, padded_vocab_size
from linear_moe.model.pattern import SOFTMAX
from linear_moe.training.run import read_config

IGNORED = (r"(^|\.)optimizer\.", r"_extra_state", r"^rng_state", r"^rerun_state")
"""Tensors of a checkpoint that are not the model's."""


_FREE = ("initializer_range", "max_position_embeddings", "router_dtype")
"""What is no part of the function: how training starts and how exactly it routes."""

_OF_SOFTMAX = (
    *("num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "qk_norm"),
    *("rope_parameters", "attention_multiplier"),
)
"""Nor is this of a model without softmax layers."""


@dataclass
class Exported:
    """What an export did."""

    target: Path
    architecture: str
    """Class of transformers, or of the folder's own code."""
    is_native: bool
    """Whether transformers has that class itself."""
    iteration: int
    num_tensors: int
    warnings: list[str] = field(default_factory=list)


def export_model(
    source: Path | str,
    target: Path | str,
    *,
    step: int | None = None,
    tokenizer: Path | str | None = None,
    native: bool = True,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> Exported:
    """Convert a run, a checkpoint folder or one iteration of it into a Hugging Face folder.

    Args:
        source: run folder, its ``checkpoint/``, or an iteration in that.
        target: folder to make; must not exist.
        step: which iteration; the last complete one unless given.
        tokenizer: folder of the tokenizer, in case it has moved since the training.
        native: use a class of transformers where one fits.
        shard_bytes: largest file of weights.
        progress: called after every tensor.

    Raises:
        ValueError: the source, the target or the tokenizer is not what it should be; nothing was written.
    """
    source, target = Path(source), Path(target)
    refuse_existing(target)
    run, folder, iteration = run_and_iteration(source, step)
    saved = read_config(run)
    model = blueprint(saved["arguments"], padded_vocab_size=saved["architecture"]["padded_vocab_size"])
    reader = Reader(folder)
    _check_checkpoint(folder, model, reader)
    texts, warnings = _tokenizer_folder(run, saved, tokenizer)
    config = _origin_config(run, model)
    vocab_size = config["vocab_size"] if config else _vocabulary(saved, texts, model.args.padded_vocab_size)
    kind, config = _architecture(model, saved["params_dtype"], vocab_size, config, native)
    table = _table(kind, model, vocab_size)
    tensors = _planned(table, reader)
    files = shards(tensors, shard_bytes)
    check_room(target, sum(planned.size for planned in tensors.values()) + 10_000_000)
    part = begin(target, _task(folder, kind, files, tensors))
    _write_tensors(part, files, tensors, _Parts(table, reader), progress)
    _write_rest(part, run, config, texts, is_native=kind != OURS)
    if kind == OURS:
        again = {"architecture": saved["architecture"], "arguments": _arguments(saved, model)}
        (part / RUN_FILE).write_text(json.dumps(again, indent=2) + "\n")
    finish(part, target)
    architecture = config["architectures"][0]
    return Exported(target, architecture, kind != OURS, iteration, len(tensors), warnings)


def _task(
    folder: Path, kind: str, files: dict[str, list[str]], tensors: dict[str, Planned]
) -> dict[str, Any]:
    """What another call has to do, too, to go on with the files of a stopped one."""
    plan = {
        file: {name: [str(tensors[name].dtype), *tensors[name].shape] for name in names}
        for file, names in files.items()
    }
    return {"source": str(folder), "files": fingerprint(list(folder.iterdir())), "to": [kind, plan]}


def _check_checkpoint(folder: Path, model: Blueprint, reader: Reader) -> None:
    found = {key: tuple(entry.size) for key, entry in reader.tensors.items()}
    if wrong := differences(model.tensors, found, ignored=IGNORED):
        raise ValueError(
            f"the tensors of {folder} are not those of the run's config.json:\n{wrong}\n"
            f"  why: config.json describes the model, and the two must match\n"
            f"  try: the run folder as it was trained, with the linear_moe that trained it"
        )
    reader.check_whole(model.tensors)


# ---- what the model is on the other side ----


def _origin_config(run: Path, model: Blueprint) -> dict[str, Any] | None:
    """config.json of the model that a run was imported from, if it has not got another vocabulary since."""
    if not (run / ORIGIN / "config.json").is_file():
        return None
    config = read_hf_config(run / ORIGIN)
    rows = config.get("vocab_size")
    is_ours = isinstance(rows, int) and padded_vocab_size(rows) == model.args.padded_vocab_size
    return config if is_ours else None


def _vocabulary(saved: dict[str, Any], tokenizer: Path | None, padded: int) -> int:
    """Rows that are tokens: a row of padding could win in ``generate()`` there, and has no text."""
    recorded = saved["tokenizer"]
    if tokenizer is not None:
        return min(describe_tokenizer(str(tokenizer)).vocab_size, padded)
    if recorded["tokenizer_type"] == "NullTokenizer" and recorded["vocab_size"]:
        return min(recorded["vocab_size"] + 1, padded)  # the last one is the end of a document
    return padded


def _architecture(
    model: Blueprint, dtype: str, vocab_size: int, origin: dict[str, Any] | None, native: bool
) -> tuple[str, dict[str, Any]]:
    """``model_type`` of the table, and the whole config.json."""
    if native and any(set(model.kinds) <= set(kinds) for kinds in KINDS.values()):
        if origin is not None and origin.get("model_type") in CLASSES:
            described = describe(origin)
            if (described.kinds, described.dtype) == (model.kinds, dtype) and _is_the_same(model, origin):
                return described.model_type, origin
        family, size = family_and_size(model)
        kind = native_type(family, size)
        if kind is not None and set(model.kinds) <= set(KINDS.get(kind, (SOFTMAX,))):
            layers = _layer_fields(kind, model)
            size = replace(size, vocab_size=vocab_size)
            config = {} if layers is None else native_config(kind, family, size, dtype=dtype, layers=layers)
            if config and _is_the_same(model, config):
                return kind, config
    return OURS, remote.hf_config(model.config, vocab_size=vocab_size, dtype=dtype)


def _arguments(saved: dict[str, Any], model: Blueprint) -> list[str]:
    """Those that shape the model, with the sizes that Megatron has defaults for: an import reads it from them alone."""
    arguments = shaping_arguments(saved["arguments"])
    needed = {field.name for field in fields(ModelSize) if field.default is MISSING} & SIZE_FLAGS.keys()
    for name in sorted((needed | {"norm_epsilon"}) - {"num_query_groups"}):  # which follow from the heads
        value = getattr(model.args, {"norm_epsilon": "layernorm_epsilon"}.get(name, name))
        arguments += [] if SIZE_FLAGS[name] in arguments else [SIZE_FLAGS[name], str(value)]
    return arguments


def _layer_fields(kind: str, model: Blueprint) -> dict[str, Any] | None:
    mixers = model.shape(1).mixers
    if kind == "mamba2":
        return mamba2.fields_of(cast(Any, mixers[mamba2.MIXER].cfg))
    if kind != "qwen3_next":
        return {}
    mixer = mixers.get(qwen3_next.MIXER)
    return qwen3_next.fields_of(model.kinds, cast(Any, mixer.cfg) if mixer is not None else None)


def _is_the_same(model: Blueprint, config: dict[str, Any]) -> bool:
    """Whether a model imported with this config would compute what ours does, by every fact that we know of both.

    Families do not say everything that a command line can: norms of queries and keys, a rotary part, other scales.
    """
    try:
        described = describe(config)
        argv = [*model_arguments(described, described.kinds), "--tokenizer-type", "NullTokenizer"]
        again = blueprint([*argv, "--vocab-size", "1"], padded_vocab_size=model.args.padded_vocab_size)
    except (ValueError, AssertionError):  # ours, of what no import takes, and Megatron's
        return False
    facts = [remote.facts(m.config, vocab_size=1, dtype="float32") for m in (model, again)]
    free = _FREE if SOFTMAX in model.kinds else (*_FREE, *_OF_SOFTMAX)
    return model.tensors == again.tensors and all(
        facts[0].get(name) == value for name, value in facts[1].items() if name not in free
    )


# ---- tensors ----


def _table(kind: str, model: Blueprint, vocab_size: int) -> list[Row]:
    table, unknown = rows(kind, model.shape(vocab_size), model.tensors)
    if unknown:
        raise ValueError(
            f"the model has {len(unknown)} tensors that cannot be exported: {', '.join(unknown[:3])}\n"
            f"  why: they are of no layer that the families have (multi-token prediction, for one)\n"
            f"  try: python tools/generate.py for this run, which needs no export"
        )
    return table


def _planned(table: list[Row], reader: Reader) -> dict[str, Planned]:
    sizes: dict[str, tuple[int, ...]] = {}
    dtypes = {}
    for row in table:
        entry = reader.tensors[row.key]
        size = tuple(entry.size) if row.expert is None else tuple(entry.size[1:])
        parts = row.transform.to_theirs(torch.empty(size, device="meta"))
        for name, part in zip(row.names, parts, strict=True):
            sizes[name] = tuple(part.shape)
            dtypes[whole_name(name)] = entry.properties.dtype
    return {name: Planned(dtypes[name], size) for name, size in joined(sizes).items()}


class _Parts:
    """Reads tensors by their new names; what the rows of the last one gave is kept, as its other names come next."""

    def __init__(self, table: list[Row], reader: Reader) -> None:
        self.reader = reader
        self.rows = {name: row for row in table for name in row.names}
        self.members = members(self.rows)
        self.last: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        """One tensor."""
        parts = self.members[name]
        self.last = {name: part for name, part in self.last.items() if self.rows[name] in self._rows(parts)}
        for row in self._rows(parts):
            if row.names[0] not in self.last:
                self.last |= zip(row.names, self._theirs(row), strict=True)
        return self.last[name] if len(parts) == 1 else torch.cat([self.last[part] for part in parts])

    def _rows(self, parts: list[str]) -> list[Row]:
        return list(dict.fromkeys(self.rows[part] for part in parts))

    def _theirs(self, row: Row) -> Iterator[Tensor] | list[Tensor]:
        if row.expert is None:
            return row.transform.to_theirs(self.reader.read(row.key))
        return row.transform.to_theirs(self.reader.read(row.key, row.expert, row.expert + 1)[0])


def _write_tensors(
    part: Path,
    files: dict[str, list[str]],
    tensors: dict[str, Planned],
    parts: _Parts,
    progress: Progress,
) -> None:
    """All files of weights but those that an interrupted export has left complete, and their index."""
    done, total = 0, sum(planned.size for planned in tensors.values())
    for name, group in files.items():
        if (part / name).is_file():
            done += sum(tensors[tensor].size for tensor in group)
            progress(done, total)
            continue
        for tensor in write_shard(part / name, group, tensors, parts.read):
            done += tensors[tensor].size
            progress(done, total)
    write_index(part, files, tensors)


# ---- the rest of the folder ----


def _tokenizer_folder(
    run: Path, saved: dict[str, Any], given: Path | str | None
) -> tuple[Path | None, list[str]]:
    """The folder of the run's tokenizer, or none, and what to warn of."""
    recorded = saved["tokenizer"]["tokenizer_model"]
    candidates = [Path(given)] if given else [run / "tokenizer", *([Path(recorded)] if recorded else [])]
    for folder in candidates:
        try:
            describe_tokenizer(str(folder))
            warning = check_given(folder, run, saved) if given else None
            return folder, [warning] if warning else []
        except TokenizerError as error:
            problem = str(error)
    if given:
        raise ValueError(
            f"--tokenizer {given} is none: {problem}\n"
            f"  why: a tokenizer is a folder with tokenizer.json and tokenizer_config.json\n"
            f"  try: such a folder, or leave it out"
        )
    warning = f"the run has no tokenizer ({problem}): copy its files into the folder, or give --tokenizer"
    if recorded:
        warning += "; without it, rows that pad the vocabulary are exported, too, and may be generated"
    return None, [warning]


def _write_rest(
    part: Path, run: Path, config: dict[str, Any], tokenizer: Path | None, *, is_native: bool
) -> None:
    (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if not is_native:
        remote.write_code(part, config)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, part)
    generation = run / ORIGIN / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, part / "generation_config.json")
    elif tokenizer is not None:
        info = describe_tokenizer(str(tokenizer))
        pad = info.pad if info.pad < config["vocab_size"] else info.eod
        tokens = {"eos_token_id": info.eod, "pad_token_id": pad}
        text = json.dumps({"_from_model_config": True, **tokens}, indent=2)
        (part / "generation_config.json").write_text(text + "\n")

"""Hugging Face -> run folder: one process, on CPU, one tensor after the other.

    DST/config.json              how the model is built, as a training would have written it
    DST/checkpoint/iter_0000001  its weights, in their own dtypes
    DST/tokenizer                the tokenizer's files, if the source has one
    DST/hugging_face             config.json and generation_config.json of the source, which export gives back;
                                 source.json: which source it was

Everything is checked before anything is written.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linear_moe.checkpoint import remote, torch_dist
from linear_moe.checkpoint.blueprint import CONTENT, Blueprint, blueprint
from linear_moe.checkpoint.folders import (
    ORIGIN,
    ORIGIN_FILES,
    Progress,
    begin,
    check_room,
    copy_tokenizer,
    fingerprint,
    finish,
    refuse_existing,
    silent,
)
from linear_moe.checkpoint.hf_config import (
    OURS,
    RUN_FILE,
    SOURCE_FILE,
    Described,
    describe_folder,
    read_config,
    weight_files,
)
from linear_moe.checkpoint.hf_folder import Stored, stored_tensors
from linear_moe.checkpoint.linearise import start_layer, start_tables
from linear_moe.checkpoint.options import check_options, linear_options, model_arguments
from linear_moe.checkpoint.origins import Origin
from linear_moe.checkpoint.parts import joined, split
from linear_moe.checkpoint.report import differences
from linear_moe.checkpoint.tables import Row, rows
from linear_moe.checkpoint.torch_dist import Piece
from linear_moe.data.tokenizer import TokenizerError, describe_tokenizer
from linear_moe.inference.checkpoint import TRACKER
from linear_moe.model.families import padded_vocab_size
from linear_moe.model.pattern import layer_kinds
from linear_moe.training import arguments
from linear_moe.training.run import write_config

ITERATION = 1
"""Step of an imported checkpoint: Megatron takes 0 for none."""

IGNORED = (r"rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$")
"""Tensors that old versions saved although they follow from the config."""

NO_FUNCTION = (
    *("architectures", "auto_map", "dtype", "vocab_size"),
    *("use_cache", "initializer_range", "max_position_embeddings"),
)
"""Fields of our config.json that may be others than the arguments make."""

EMBEDDINGS = ("model.embed_tokens.weight", "backbone.embeddings.weight")

LEFT_OUT = r"mtp\."
"""Tensors that transformers does not read either."""


@dataclass
class Imported:
    """What an import did."""

    target: Path
    described: Described
    kinds: tuple[str, ...]
    origins: list[Origin] = field(default_factory=list)
    """Where each tensor came from, one row for tensors that differ in layer and expert only."""
    warnings: list[str] = field(default_factory=list)


def import_model(
    source: Path | str,
    target: Path | str,
    *,
    la_module: str | None = None,
    layer_type_list: str | None = None,
    kinds: Sequence[str] | None = None,
    extra_args: Sequence[str] = (),
    allow_pickle: bool = False,
    progress: Progress = silent,
) -> Imported:
    """Convert a Hugging Face folder into a run folder, exactly, or with some layers replaced by mixers.

    Args:
        source: folder with config.json and safetensors.
        target: run folder to make; must not exist.
        la_module: mixer of the L layers; ``None``: the model as it is, softmax everywhere.
        layer_type_list: one symbol per layer, L or N, repeated as in training.
        kinds: instead of these two: the mixer, or softmax, of every layer.
        extra_args: arguments of the mixers (``--gla-gate-rank 32``).
        allow_pickle: read ``pytorch_model.bin`` where there are no safetensors.
        progress: called after every tensor.

    Raises:
        ValueError: the source or the target is not what it should be; nothing was written.
    """
    source, target = Path(source), Path(target)
    refuse_existing(target)
    arguments.import_mixer_modules(list(extra_args))
    check_options(extra_args)
    described = describe_folder(source)
    stored = stored_tensors(source, allow_pickle=allow_pickle)
    kinds = _kinds(described, kinds, la_module, layer_type_list)
    tokenizer, warnings = _tokenizer_arguments(source, described, target)
    warnings += [*described.warnings, *_left_out(described, stored)]
    argv = [*model_arguments(described, kinds), *tokenizer]
    argv += [*linear_options(set(kinds) - set(described.kinds), extra_args), *extra_args]
    model = _built(source, argv, padded_vocab_size(described.size.vocab_size))
    pieces, origins = _pieces(source, described, model, stored)
    total = sum(piece.size for piece in pieces)
    check_room(target, total + 10_000_000)
    files = [entry.path for entry in stored.values()]
    part = begin(target, {"source": str(source.absolute()), "files": fingerprint(files), "arguments": argv})
    done = 0
    for size in torch_dist.write(_iteration(part), pieces, model.objects | _common_state(model)):
        done += size
        progress(done, total)
    _write_rest(source, part, model, argv)
    finish(part, target)
    return Imported(target, described, kinds, origins, warnings)


def _kinds(
    described: Described, kinds: Sequence[str] | None, la_module: str | None, layer_type_list: str | None
) -> tuple[str, ...]:
    from linear_moe import lsm

    if kinds and (la_module or layer_type_list):
        raise ValueError(
            "--layer-kinds and --la-module or --layer-type-list are given\n"
            "  why: either says which mixer each layer gets\n"
            "  try: one of them"
        )
    if kinds or (la_module is None and layer_type_list is None):
        return tuple(kinds or described.kinds)
    return layer_kinds(layer_type_list, la_module, described.size.num_layers, known=lsm.names())


def _left_out(described: Described, stored: Mapping[str, Stored]) -> list[str]:
    count = sum(re.match(LEFT_OUT, name) is not None for name in stored)
    if not count or described.model_type != "qwen3_next":
        return []
    return [f"{count} tensors of multi-token prediction (mtp) are left out"]


def _built(source: Path, argv: list[str], rows: int) -> Blueprint:
    try:
        return blueprint(argv, padded_vocab_size=rows)
    except (ValueError, AssertionError) as error:
        if "\n  why: " in str(error):
            raise
        raise ValueError(
            f"Megatron does not build the model of {source}: {error}\n"
            f"  why: its config.json, or an option of its mixers, has values that do not go together there\n"
            f"  try: other options, or a model without them"
        ) from error


def _tokenizer_arguments(source: Path, described: Described, target: Path) -> tuple[list[str], list[str]]:
    try:
        tokens = describe_tokenizer(str(source)).vocab_size
    except TokenizerError as error:
        warning = (
            f"{source} has no tokenizer that we can read ({error}): the run gets none, its tokens are numbers; "
            f"put tokenizer.json and tokenizer_config.json there and import again, or set TOKENIZER in training"
        )
        vocab = str(described.size.vocab_size - 1)  # that tokenizer adds the end of a document
        return ["--tokenizer-type", "NullTokenizer", "--vocab-size", vocab], [warning]
    folder, warnings = str((target / "tokenizer").absolute()), []
    if tokens > described.size.vocab_size:
        warnings.append(
            f"the tokenizer of {source} has {tokens} tokens and the model {described.size.vocab_size} rows for them: "
            f"it has not learned the others, which transformers would refuse"
        )
    return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", folder], warnings


# ---- tensors ----


def _pieces(
    source: Path, described: Described, model: Blueprint, stored: Mapping[str, Stored]
) -> tuple[list[Piece], list[Origin]]:
    before = source_model(model, described)
    if described.model_type == OURS:
        _check_config(source, before)
    carried, unknown = rows(described.model_type, before.shape(described.size.vocab_size), before.tensors)
    assert not unknown, unknown
    parts = {name: size for row in carried for name, size in _their_shapes(row, before.tensors[row.key])}
    expected = joined(parts)
    found = {name: entry.shape for name, entry in stored.items()}
    ignored = [*IGNORED, r"^lm_head\.weight$"] if described.size.tie_embeddings else list(IGNORED)
    if described.model_type == "qwen3_next":
        ignored.append(f"^{LEFT_OUT}")
    if wrong := differences(expected, found, ignored=ignored):
        raise ValueError(
            f"the tensors of {source} are not those of its config.json:\n{wrong}\n"
            f"  why: a model of type {described.model_type} with these sizes has {len(expected)} tensors\n"
            f"  try: the config.json that belongs to these weights, or a complete copy"
        )
    if described.size.tie_embeddings:
        _check_tied(source, stored)
    _check_kept(source, before, model)
    stored = split(stored, parts)
    pieces = []
    origins: dict[str, Origin] = {}
    for row in carried:
        if not _is_replaced(row.key, described.kinds, model.kinds):
            pieces.append(_carried_piece(row, model.tensors[row.key], stored))
            Origin.note(origins, row.key, "carried", ", ".join(row.names))
    by_key = {row.key: row for row in carried}
    for layer, kind in enumerate(model.kinds):
        if kind != described.kinds[layer]:
            pieces += start_layer(model, layer, by_key, stored, origins)
    pieces += start_tables(model, set(model.kinds) - set(described.kinds), origins)
    _check_complete(model, pieces)
    return pieces, list(origins.values())


def _check_config(source: Path, before: Blueprint) -> None:
    """What transformers reads of one of our folders has to be what its arguments make."""
    config = read_config(source)
    made = remote.hf_config(before.config, vocab_size=config["vocab_size"], dtype=str(config.get("dtype")))
    made = {name: value for name, value in json.loads(json.dumps(made)).items() if name not in NO_FUNCTION}
    wrong = [name for name, value in made.items() if name in config and not _agree(value, config[name])]
    if wrong:
        raise ValueError(
            f"{source} has other values of {', '.join(wrong)} in config.json than {RUN_FILE} makes\n"
            f"  why: transformers reads the one and an import the other, and they are of two models\n"
            f"  try: config.json as it was exported"
        )


def _agree(made: Any, given: Any) -> bool:
    """Transformers adds fields to those of fields."""
    if isinstance(made, dict) and isinstance(given, dict):
        return all(_agree(value, given[name]) for name, value in made.items() if name in given)
    return bool(made == given)


def _check_tied(source: Path, stored: Mapping[str, Stored]) -> None:
    """An output layer that lies there although the config ties it to the embedding has to be the embedding."""
    layer = stored.get("lm_head.weight")
    table = next((stored[name] for name in EMBEDDINGS if name in stored), None)
    if layer is None or table is None:
        return
    same = layer.shape == table.shape and layer.dtype == table.dtype
    if not (same and torch.equal(layer.read("lm_head.weight"), table.read("embedding"))):
        raise ValueError(
            f"{source} has an output layer, lm_head.weight, that is not its embedding, and a config that ties them\n"
            f"  why: transformers does not tie them then, so which of the two is meant is open\n"
            f'  try: "tie_word_embeddings": false in config.json; or the file without lm_head.weight'
        )


def _check_kept(source: Path, before: Blueprint, model: Blueprint) -> None:
    """Layers that stay compute what they did: options of new ones may be theirs, too, or they read the others."""
    mixers = [built.shape(1).mixers for built in (before, model)]
    options = [
        f"{name} of {kind}"
        for kind, mixer in mixers[0].items()
        for name in (option.name for option in fields(mixer.cfg) if option.name != "layers_of_kind")
        if getattr(mixer.cfg, name) != getattr(mixers[1][kind].cfg, name)
    ]
    if options:
        raise ValueError(
            f"--extra-args would change layers of {source} that stay: {', '.join(options)}\n"
            f"  why: their weights have been trained with the values in its config.json\n"
            f"  try: options of the new mixers alone, which begin with their names (--gla-gate-rank 32)"
        )
    changed = [
        key
        for key, size in model.tensors.items()
        if not _is_replaced(key, before.kinds, model.kinds)
        and not _is_replaced(key, model.kinds, before.kinds)
        and before.tensors.get(key) != size
    ]
    if changed:
        more = {kind for kind in before.kinds if model.kinds.count(kind) > before.kinds.count(kind)}
        pairs = zip(before.kinds, model.kinds, strict=True)
        others = ["gla" if kind != was and kind in more else kind for was, kind in pairs]
        raise ValueError(
            f"{source} cannot get more layers of {', '.join(sorted(more))}: those that it has would change "
            f"({', '.join(changed[:3])})\n"
            f"  why: each of them depends on how many there are, or on the first one\n"
            f"  try: another mixer for the new layers, such as --layer-kinds {','.join(others)}"
        )


def source_model(model: Blueprint, described: Described) -> Blueprint:
    """The model of the source: the same with the mixers that it has."""
    if model.kinds == described.kinds:
        return model
    argv = model_arguments(described, described.kinds)
    argv += ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(described.size.vocab_size - 1)]
    return blueprint(argv, padded_vocab_size=model.args.padded_vocab_size)


def _is_replaced(key: str, before: Sequence[str], after: Sequence[str]) -> bool:
    """Whether a key of the source belongs to a mixer that its layer, or every layer, gives up."""
    if match := re.match(r"decoder\.layers\.(\d+)\.self_attention\.", key):
        return before[int(match[1])] != after[int(match[1])]
    owner = re.match(r"(\w+)_tables\.", key)
    return owner is not None and owner[1] not in after


def _their_shapes(row: Row, size: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    ours = torch.empty(size if row.expert is None else size[1:], device="meta")
    parts = row.transform.to_theirs(ours)
    return [(name, tuple(part.shape)) for name, part in zip(row.names, parts, strict=True)]


def _carried_piece(row: Row, size: tuple[int, ...], stored: Mapping[str, Stored]) -> Piece:
    dtypes = {stored[name].dtype for name in row.names}
    if len(dtypes) > 1:
        raise ValueError(
            f"{', '.join(row.names)} have different dtypes: {', '.join(sorted(map(str, dtypes)))}\n"
            f"  why: here they are one tensor\n"
            f"  try: save the model in one dtype (model.to(torch.bfloat16).save_pretrained(..))"
        )
    rest = (0,) * (len(size) - 1)
    offset = (row.expert or 0, *rest)
    shape = size if row.expert is None else (1, *size[1:])
    return Piece(row.key, size, offset, shape, dtypes.pop(), _maker(row, shape, stored))


def _maker(row: Row, shape: tuple[int, ...], stored: Mapping[str, Stored]) -> Callable[[], Tensor]:
    def make() -> Tensor:
        return row.transform.to_ours([stored[name].read(name) for name in row.names]).reshape(shape)

    return make


def _check_complete(model: Blueprint, pieces: list[Piece]) -> None:
    covered: dict[str, int] = {}
    for piece in pieces:
        covered[piece.key] = covered.get(piece.key, 0) + torch.Size(piece.shape).numel()
    wanted = {key: torch.Size(size).numel() for key, size in model.tensors.items()}
    assert covered == wanted, {
        key: (covered.get(key), wanted.get(key)) for key in covered.keys() ^ wanted.keys()
    }


# ---- the rest of the run folder ----


def _iteration(run: Path) -> Path:
    return run / "checkpoint" / f"iter_{ITERATION:07d}"


def _common_state(model: Blueprint) -> dict[str, object]:
    """What Megatron keeps beside tensors: arguments, versions; no optimizer and no random state."""
    args = model.args
    args.no_save_optim = args.no_save_rng = True
    state: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": ITERATION}
    state |= {"num_floating_point_operations_so_far": 0, "content_metadata": dict(CONTENT)}
    return {"common_state/shard_0_1": state}


def _write_rest(source: Path, part: Path, model: Blueprint, argv: list[str]) -> None:
    (part / "checkpoint" / TRACKER).write_text(str(ITERATION))
    if "HuggingFaceTokenizer" in argv:
        copy_tokenizer(source, part / "tokenizer")
    (part / ORIGIN).mkdir(exist_ok=True)
    for name in ORIGIN_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, part / ORIGIN / name)
    made_of = {"folder": str(source.absolute()), "weights": weight_files(source)}
    (part / SOURCE_FILE).write_text(json.dumps(made_of, indent=1) + "\n")
    write_config(part, model.args, argv)

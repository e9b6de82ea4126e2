"""Checks of what a run reads and writes: token files, their vocabulary, the disk."""

import difflib
import os
import shlex
import shutil
from pathlib import Path

from linear_moe.data.indexed import CorruptDataError, read_index, read_manifest, read_tokens
from linear_moe.launch.errors import PreflightError
from linear_moe.launch.megatron_args import held_out_documents
from linear_moe.launch.plan import RunPlan
from linear_moe.model.families import estimate_parameters

_SCANNED_TOKENS = 64_000_000
"""Tokens read to find the largest one, when no manifest tells: 0.2 s."""

_LONGEST_NAME = 255
"""Bytes of a name in every file system of Linux."""

_BYTES_PER_PARAMETER = 16
"""Of a checkpoint: weight, float32 master weight and two Adam moments."""


def check_data(plan: RunPlan) -> None:
    """Weights are positive; each prefix has two whole files, at least one sequence, the vocabulary of the tokenizer."""
    if not all(0 < weight < float("inf") for weight in plan.blend_weights):
        raise PreflightError(
            f"DATASET_PATH={plan.settings.dataset_path} has a weight that is not a positive number.",
            "a blend draws from each of its files in proportion to its weight.",
            f"DATASET_PATH='{' '.join(f'1 {prefix}' for prefix in plan.prefixes)}'",
        )
    for prefix in plan.prefixes:
        try:
            info = read_index(prefix)
        except FileNotFoundError as error:
            if _is_weight(prefix):
                raise _half_a_blend(plan) from None
            raise PreflightError(
                f"DATASET_PATH={prefix}: there is no {error.filename}.",
                "DATASET_PATH is the path of a .bin/.idx pair without its suffix, often ending in _text_document"
                f"{'; a space separates two of them.' if ' ' in plan.settings.dataset_path else '.'}",
                _data_hint(prefix),
            ) from None
        except CorruptDataError as error:
            raise PreflightError(
                f"DATASET_PATH={prefix} cannot be read: {error}.",
                "the copy or the preprocessing was cut short.",
                "copy it again, or python tools/preprocess_data.py ... --overwrite",
            ) from None
        if info.num_tokens <= plan.settings.seq_len:
            raise PreflightError(
                f"DATASET_PATH={prefix} has {info.num_tokens} tokens, less than one sequence.",
                f"a sample is SEQ_LEN + 1 = {plan.settings.seq_len + 1} tokens.",
                f"more data, or SEQ_LEN={max(1, info.num_tokens // 4)}",
            )
        if plan.settings.eval_iters and not held_out_documents(info.num_documents):
            raise PreflightError(
                f"DATASET_PATH={prefix} has {info.num_documents} document(s), too few to hold one out.",
                "evaluation reads 1 % of the documents, rounded.",
                "EVAL_ITERS=0 to train on all of them, or more than 50 documents",
            )
        _check_vocabulary(plan, prefix)


def _is_weight(word: str) -> bool:
    try:
        float(word.rstrip("%"))
    except ValueError:
        return False
    return True


def _half_a_blend(plan: RunPlan) -> PreflightError:
    named = [prefix for prefix in plan.prefixes if not _is_weight(prefix)]
    return PreflightError(
        f"DATASET_PATH={plan.settings.dataset_path} is no blend.",
        "a blend is a number and a prefix in turn, with a space between each two; a prefix in it has no spaces.",
        f"DATASET_PATH='{' '.join(f'{1 / max(len(named), 1):.2g} {prefix}' for prefix in named or ['<prefix>'])}'",
    )


def _data_hint(prefix: str) -> str:
    if any(Path(prefix + end).exists() for end in (".bin", ".idx")):
        return "copy the other of the two files there, too"
    whole = prefix.removesuffix(".bin").removesuffix(".idx")
    if whole != prefix and all(Path(whole + end).exists() for end in (".bin", ".idx")):
        return f"DATASET_PATH={shlex.quote(whole)}"
    folder = Path(prefix) if Path(prefix).is_dir() else Path(prefix).parent
    indices = sorted(folder.glob("*.idx")) if folder.is_dir() else []
    found = [path.with_suffix("").name for path in indices if path.with_suffix(".bin").exists()]
    if found:
        near = difflib.get_close_matches(Path(prefix).name, found, n=1, cutoff=0.3)
        found = [*near, *(name for name in found if name not in near)]
        return f"DATASET_PATH={shlex.quote(str(folder / found[0]))}" + (
            f" (also there: {', '.join(found[1:4])})" if found[1:] else ""
        )
    return "python tools/preprocess_data.py to make one, or DATASET_PATH=mock"


def _check_vocabulary(plan: RunPlan, prefix: str) -> None:
    try:
        manifest = read_manifest(prefix)
    except CorruptDataError as error:
        raise PreflightError(
            f"{error}.",
            "it should say which tokenizer wrote the data.",
            f"rm {shlex.quote(f'{prefix}.json')}, or preprocess again",
        ) from None
    source = plan.settings.tokenizer or "null"
    if manifest is not None and plan.tokenizer is not None:
        if manifest.tokenizer_fingerprint != plan.tokenizer.fingerprint:
            again = f"preprocess the text again with {source}"
            has_changed = Path(manifest.tokenizer) == Path(plan.tokenizer.path).absolute()
            raise PreflightError(
                f"DATASET_PATH={prefix} was written with another tokenizer than TOKENIZER={source}.",
                f"the data has vocabulary {manifest.vocab_size} of {manifest.tokenizer}"
                f"{', which has changed since' if has_changed else ''}, "
                f"TOKENIZER {plan.tokenizer.vocab_size}, and their tokens mean different text.",
                again if has_changed else f"TOKENIZER={shlex.quote(manifest.tokenizer)}, or {again}",
            )
        return
    largest = (
        manifest.vocab_size - 1 if manifest is not None else int(read_tokens(prefix, _SCANNED_TOKENS).max())
    )
    if largest >= plan.vocab_size:
        raise PreflightError(
            f"DATASET_PATH={prefix} has token {largest}, but the vocabulary of TOKENIZER={source} "
            f"ends at {plan.vocab_size - 1}.",
            "data and model have to share one tokenizer.",
            "TOKENIZER=<the tokenizer that wrote the data>"
            + (f", or VOCAB_SIZE={largest + 1}" if plan.tokenizer is None else ""),
        )


def check_run_name(plan: RunPlan) -> None:
    """RUN_NAME is a name below OUTPUT_BASEPATH that a folder can have, and of no folder that is another's."""
    name, base = plan.run_name, plan.settings.output_basepath
    parts = name.split("/")
    if {"", ".", ".."} & {*parts}:
        whole = Path(os.path.normpath(plan.run_dir))
        raise PreflightError(
            f"RUN_NAME={name} is a path.",
            "the run lives in OUTPUT_BASEPATH/RUN_NAME, among other runs.",
            f"OUTPUT_BASEPATH={shlex.quote(str(whole.parent))} RUN_NAME={shlex.quote(whole.name)}",
        )
    others = (
        {plan.run_dir.parent: "a run of its own"} if (plan.run_dir.parent / "config.json").exists() else {}
    )
    others |= {plan.run_dir: "the index files of all runs"} if parts[-1] == "data_cache" else {}
    for folder, inside in others.items():
        raise PreflightError(
            f"RUN_NAME={name} is taken: {folder} holds {inside}.",
            "the files of two would be mixed.",
            f"another RUN_NAME, or another OUTPUT_BASEPATH than {base}",
        )
    if max(len(os.fsencode(part)) for part in parts) > _LONGEST_NAME:
        raise PreflightError(
            f"RUN_NAME={name} is {len(name)} characters long.",
            f"names of folders end at {_LONGEST_NAME} bytes.",
            f"RUN_NAME={shlex.quote(name[:40])}",
        )


def check_output(plan: RunPlan) -> None:
    """OUTPUT_BASEPATH can be written to and has room for one checkpoint."""
    parent = plan.run_dir
    while not parent.exists():
        parent = parent.parent
    total, _ = estimate_parameters(plan.size, plan.kinds, plan.padded_vocab_size)
    needed = total * _BYTES_PER_PARAMETER * 1.1
    free = shutil.disk_usage(parent).free
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise PreflightError(
            f"cannot write to {parent}.",
            f"the run lives in {plan.run_dir}.",
            "OUTPUT_BASEPATH=<a folder of yours>",
        )
    if plan.settings.save_interval > 0 and free < needed:
        raise PreflightError(
            f"{parent} has {free / 1e9:.2f} GB free; one checkpoint needs about {needed / 1e9:.2f} GB.",
            f"{total / 1e9:.3f}B parameters x {_BYTES_PER_PARAMETER} bytes (weights and optimizer), and 10 %.",
            "OUTPUT_BASEPATH=<a larger disk>, or SAVE_INTERVAL=0 to save nothing",
        )

"""Text to Megatron's token files: tokenize every document, mark where it begins and ends, write all or nothing.

It ends with the end of a document, and begins with what the tokenizer puts before any text, if it does.

The files are `PREFIX_text_document.{bin,idx,json}`, named as Megatron's own tool names them. They appear under their
names only when they are whole: a killed run leaves no half-written data set behind.
"""

import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from linear_moe.data.corpus import check_inputs, read_documents
from linear_moe.data.indexed import Manifest, manifest_text, read_index
from linear_moe.data.tokenizer import TokenizerError, TokenizerInfo, describe_tokenizer

_BATCH = 256
"""Documents tokenized at a time, by as many threads as there are cores."""

_SILENCE = 30.0
"""Seconds without a word: a corpus takes hours."""


def preprocess(
    inputs: list[str],
    output_prefix: str,
    tokenizer: str,
    *,
    key: str = "text",
    overwrite: bool = False,
    empty: Counter[str] | None = None,
    tell: Callable[[str], None] | None = None,
) -> tuple[str, Manifest]:
    """Tokenize the documents of `inputs` (JSONL, or one document per text file), in order; `empty` ones are counted.

    Every half minute `tell` gets a line that says how far it is.

    Returns the prefix for DATASET_PATH and the manifest written beside the files. Raises ValueError when the files
    exist and `overwrite` is false, when an input is missing or a line of it broken, when `tokenizer` cannot be used,
    when there is no document, and when the files cannot be written.
    """
    prefix = f"{output_prefix}_{key}_document"
    if not overwrite and (Path(prefix + ".idx").exists() or Path(prefix + ".bin").exists()):
        raise ValueError(
            f"{prefix}.bin or .idx exists.\n"
            f"  why: token files are never replaced by accident; a run may be reading them.\n"
            f"  try: --overwrite, or another --output-prefix"
        )
    check_inputs(inputs)
    info = _usable(tokenizer)
    part = f"{prefix}.part{os.getpid()}"
    try:
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        manifest = _write(part, inputs, info, key, empty, tell)
        assert read_index(part).num_tokens == manifest.num_tokens
        _publish(part, prefix)
    except OSError as error:
        if error.strerror is None:  # a library that Megatron cannot load
            raise
        raise ValueError(
            f"{prefix}.bin and .idx cannot be written: {error.strerror}.\n"
            f"  why: they take 2 bytes a token, 4 with a vocabulary above 65499; what was begun is removed.\n"
            f"  try: make room, or --output-prefix with a folder of yours on a disk with room"
        ) from None
    finally:
        for suffix in (".bin", ".idx", ".json"):
            Path(part + suffix).unlink(missing_ok=True)
    return prefix, manifest


def _usable(tokenizer: str) -> TokenizerInfo:
    try:
        return describe_tokenizer(tokenizer)
    except TokenizerError as error:
        raise ValueError(
            f"--tokenizer {tokenizer} cannot be used: {error}.\n"
            f"  why: a tokenizer is a folder with tokenizer.json and tokenizer_config.json.\n"
            f"  try: the folder that tools/train_tokenizer.py wrote, or the downloaded folder of a Hugging Face model"
        ) from None


def _write(
    part: str,
    inputs: list[str],
    info: TokenizerInfo,
    key: str,
    empty: Counter[str] | None,
    tell: Callable[[str], None] | None,
) -> Manifest:
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    texts = itertools.chain(*(read_documents(path, key, empty) for path in inputs))
    documents = tokens = 0
    told = time.monotonic()
    builder = IndexedDatasetBuilder(part + ".bin", dtype=DType.optimal_dtype(info.vocab_size))
    for ids in _tokenize(texts, info.path, info.eod):
        builder.add_document(ids, [len(ids)])
        documents, tokens = documents + 1, tokens + len(ids)
        if tell is not None and time.monotonic() - told > _SILENCE:
            told = time.monotonic()
            tell(f"{documents} documents, {tokens} tokens so far")
    if not documents:
        raise ValueError(
            f"{', '.join(inputs)} holds no document.\n"
            f"  why: every line is empty, or has an empty {key!r}.\n"
            f"  try: another input, or --json-key"
        )
    builder.finalize(part + ".idx")
    manifest = Manifest(
        tokenizer=str(Path(info.path).absolute()),
        tokenizer_fingerprint=info.fingerprint,
        vocab_size=info.vocab_size,
        eod=info.eod,
        num_tokens=tokens,
        num_documents=documents,
        source=[str(Path(path).absolute()) for path in inputs],
    )
    Path(part + ".json").write_text(manifest_text(manifest))
    return manifest


def _publish(part: str, prefix: str) -> None:
    # The index goes first and comes last: without it the pair does not exist for any reader.
    Path(prefix + ".idx").unlink(missing_ok=True)
    for suffix in (".bin", ".json", ".idx"):
        os.replace(part + suffix, prefix + suffix)


def _tokenize(documents: Iterable[str], folder: str, eod: int) -> Iterator[np.ndarray]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # a document that spells out <|endoftext|> does not end there
    first = _first_tokens(tokenizer)
    for batch in itertools.batched(documents, _BATCH):
        for encoding in tokenizer.encode_batch_fast(list(batch), add_special_tokens=False):
            yield np.asarray([*first, *encoding.ids, eod], dtype=np.int64)


def _first_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer itself puts before a text (Llama, Mixtral), and so before every prompt and scored text."""
    text = tokenizer.encode("a")
    return text.ids[: text.special_tokens_mask.index(0)]

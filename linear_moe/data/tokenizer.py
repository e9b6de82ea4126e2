"""Tokenizers as folders that Megatron's HuggingFaceTokenizer opens offline: train a byte-level BPE, describe one.

A folder holds `tokenizer.json` (vocabulary, merges, how to split) and `tokenizer_config.json` (which token ends a
document). Describing one needs only json, so that the launcher can compare vocabularies in no time.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

END_OF_DOCUMENT = "<|endoftext|>"
PADDING = "<|padding|>"  # its own token: Megatron masks the loss of pads, and documents must learn to end

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja"),
)
"""What the folder of a tokenizer may hold; ``tokenizer.json`` is what we read, ``transformers`` may read all of it."""


class TokenizerError(ValueError):
    """A path that is not a usable tokenizer; the text says what is missing."""


@dataclass(frozen=True)
class TokenizerInfo:
    """What a run needs to know about a tokenizer."""

    path: str
    """The folder."""
    base_vocab_size: int
    """Tokens of the BPE model, without added special tokens: what EXTRA_VOCAB_SIZE is added to."""
    vocab_size: int
    """One more than the largest token id."""
    eod: int
    """Token at the end of every document."""
    pad: int
    """Token in the empty places of a batch; ``eod`` where the tokenizer has none that stands for nothing else."""
    fingerprint: str
    """Hash of vocabulary, merges and added tokens; does not depend on the path or on the file's layout."""


@dataclass(frozen=True)
class _Content:
    """What a tokenizer's two files say."""

    folder: Path
    ids: dict[str, int]
    base_vocab_size: int
    merges: Any
    special: dict[str, Any]


def describe_tokenizer(path: str) -> TokenizerInfo:
    """Facts of the tokenizer at `path`, a folder or a `tokenizer.json`. Raises TokenizerError when it is not one."""
    content = _read(path)
    ids, folder = content.ids, content.folder
    eos, pad = (content.special[name] for name in ("eos_token", "pad_token"))
    if eos not in ids:
        raise TokenizerError(f"{folder} names no end-of-document token (eos_token of tokenizer_config.json)")
    canonical = json.dumps([sorted(ids.items()), content.merges], sort_keys=True)
    fingerprint = hashlib.sha256(canonical.encode()).hexdigest()[:16]
    largest = max(ids.values())
    pad = eos if pad in (None, content.special["bos_token"]) else pad  # a prompt may begin with the latter
    return TokenizerInfo(
        path=str(folder),
        base_vocab_size=content.base_vocab_size,
        vocab_size=largest + 1,
        eod=ids[eos],
        pad=ids.get(pad, ids[eos]),
        fingerprint=fingerprint,
    )


def added_tokens(own: str, other: str) -> int | None:
    """How many tokens `other` has besides those of `own`; None when it reads or writes other text with the latter.

    Raises TokenizerError when one of them is no tokenizer.
    """
    before, after = _read(own), _read(other)
    if _pairs(before.merges) != _pairs(after.merges) or not before.ids.items() <= after.ids.items():
        return None
    return len(after.ids) - len(before.ids)


def _read(path: str) -> _Content:
    folder = Path(path).parent if Path(path).name == "tokenizer.json" else Path(path)
    file = folder / "tokenizer.json"
    if not folder.exists():
        raise TokenizerError(f"{folder} does not exist")
    if not file.exists():
        raise TokenizerError(f"{folder} has no tokenizer.json")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        model, vocab = content["model"], content["model"]["vocab"]
        if not isinstance(vocab, dict):  # a unigram model lists its tokens, each with a score
            vocab = {token: i for i, (token, *_) in enumerate(vocab)}
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    except FileNotFoundError as error:
        raise TokenizerError(f"{folder} has no {Path(str(error.filename)).name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise TokenizerError(f"{folder} is not a tokenizer ({type(error).__name__}: {error})") from None
    named = {name: config.get(name) for name in ("eos_token", "bos_token", "pad_token")}
    special = {
        name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()
    }
    base = sum(token not in added for token in vocab)
    return _Content(folder, {**vocab, **added}, base, model.get("merges"), special)


def _pairs(merges: Any) -> list[list[str]]:
    """Merges in the form of newer files: earlier ones write each as one text."""
    return [pair.split(" ") if isinstance(pair, str) else pair for pair in merges or []]


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str) -> TokenizerInfo:
    """Train a byte-level BPE of `vocab_size` tokens, the two special ones included, and save it as a folder.

    Fewer when the text has no more pairs to join. Raises ValueError for too few to write every byte, for no text, and
    when the folder cannot be written.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), [END_OF_DOCUMENT, PADDING]
    if vocab_size < len(alphabet) + len(special):
        raise ValueError(
            f"--vocab-size is {vocab_size}.\n"
            f"  why: {len(alphabet)} bytes and {len(special)} special tokens have to be in it.\n"
            f"  try: --vocab-size 4096"
        )
    texts = iter(texts)
    first = next((text for text in texts if text), None)
    if first is None:
        raise ValueError(
            "the input holds no text.\n"
            "  why: every file or line is empty, and a tokenizer is learned from text.\n"
            "  try: another --input, or --json-key"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=alphabet,  # every byte, so that no text is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.chain([first], texts), trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_DOCUMENT,
        "pad_token": PADDING,
        "padding_side": "left",  # a batch of prompts goes on behind its last token
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    files = {
        "tokenizer_config.json": json.dumps(config, indent=1) + "\n",
        "tokenizer.json": tokenizer.to_str(pretty=True),  # last: without it the folder is no tokenizer
    }
    try:
        _write_all(Path(folder), files)
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be written: {error.strerror}.\n"
            f"  why: a tokenizer is a folder with {' and '.join(files)}; what was begun is removed.\n"
            f"  try: make room, or --output with a folder of yours on a disk with room"
        ) from None
    return describe_tokenizer(folder)


def _write_all(folder: Path, files: dict[str, str]) -> None:
    """All of them, or none: each has its name when all are on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: folder / f"{name}.part{os.getpid()}" for name in files}
    try:
        for name, part in parts.items():
            part.write_text(files[name], encoding="utf-8")
        for name, part in parts.items():
            part.replace(folder / name)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)

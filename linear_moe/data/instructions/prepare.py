"""From JSONL to a folder of tokens, once: a run that starts again, or another one on the same data, only opens it.

    FOLDER/tokens.npy   learned.npy   ends.npy   report.json

The folder's name is a hash of all that its content follows from, and it appears whole or not at all.
"""

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from linear_moe.data.instructions.records import Conversation, read_conversations
from linear_moe.data.instructions.report import Report
from linear_moe.data.instructions.template import ChatTemplate, Rendered
from linear_moe.data.instructions.tokens import Sample, tokenize

FORMAT = 2
"""Version of the folder."""

_BATCH = 1024
"""Samples tokenized at a time, by as many threads as there are cores."""

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "chat_template.jinja",
)
"""What a tokenizer is opened from: beside its tokens, how it splits text, which are special, its template."""

OverLong = Literal["drop", "truncate"]


@dataclass(frozen=True)
class Prepared:
    """An opened folder."""

    folder: Path
    """Where it is."""
    tokens: np.ndarray
    """``[T]`` of all samples, memory-mapped."""
    learned: np.ndarray
    """``[T]`` bool, memory-mapped."""
    ends: np.ndarray
    """``[N]`` int64: where each sample ends in ``tokens``."""
    report: Report
    """What became of the samples."""

    @property
    def lengths(self) -> np.ndarray:
        """Room of each sample in a sequence, ``[N]``."""
        return np.diff(self.ends, prepend=0) - 1

    def sample(self, index: int) -> Sample:
        """Tokens of one sample."""
        part = slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))
        return Sample(self.tokens[part], self.learned[part])

    def holds(self, other: "Prepared") -> bool:
        """Whether the samples are those of another folder, in the same order."""
        names = ("ends", "tokens", "learned")
        return all(np.array_equal(getattr(self, name), getattr(other, name)) for name in names)


def prepare(
    paths: list[str],
    tokenizer: str,
    cache: Path,
    *,
    fingerprint: str,
    seq_length: int,
    over_long: OverLong = "drop",
    template: str | None = None,
    variable: str = "DATASET_PATH",
    announce: Callable[[str], None] = lambda line: None,
) -> Prepared:
    """The tokens of all samples in ``paths``; from ``cache`` if they were made before.

    Args:
        paths: JSONL files.
        tokenizer: folder.
        cache: where the folder is, or will be.
        fingerprint: of the tokenizer's vocabulary.
        seq_length: room of a sequence.
        over_long: what happens to longer samples.
        template: chat template instead of the tokenizer's.
        variable: what messages call ``paths``.
        announce: told before the files are tokenized, which may take a while.

    Raises:
        ValueError: a file that cannot be read, a line that is no sample, no chat template, no sample left.
    """
    files = [Path(tokenizer, name) for name in _TOKENIZER_FILES]
    settings = [FORMAT, fingerprint, seq_length, over_long, template]
    key = _key(settings, [*paths, *filter(Path.exists, files)], variable)
    folder = cache / f"instructions-{key}"
    if not folder.exists():
        announce(f"tokenizing {', '.join(paths)}")
        chat = ChatTemplate(_open(tokenizer), template)
        _write(folder, paths, chat, _Tally(seq_length, over_long), variable)
    return open_prepared(folder)


def open_prepared(folder: Path) -> Prepared:
    """A folder that ``prepare`` has made.

    Raises:
        ValueError: it is not there, or damaged.
    """
    try:
        tokens, learned, ends = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "learned", "ends")
        )
        report = Report(**json.loads((folder / "report.json").read_text()))
        assert len(tokens) == len(learned) == int(ends[-1])
    except (OSError, EOFError, ValueError, TypeError, AssertionError) as error:
        raise ValueError(
            f"{folder} holds no prepared samples ({type(error).__name__}: {error})\n"
            f"  why: it is missing, or a file of it was changed\n"
            f"  try: remove it, and start the run script again: it is made anew"
        ) from None
    return Prepared(folder, tokens, learned, ends, report)


def _key(settings: list[Any], paths: Iterable[str | Path], variable: str) -> str:
    """Hash of settings and files."""
    digest = hashlib.sha256(json.dumps(settings).encode())
    for path in paths:
        try:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ValueError(
                f"{path} cannot be read: {error.strerror}\n"
                f"  why: samples for finetuning are JSONL files, one conversation a line\n"
                f"  try: {variable}=<file>.jsonl"
            ) from None
    return digest.hexdigest()[:16]


def _open(tokenizer: str) -> Any:
    from transformers import AutoTokenizer

    try:
        # False and not unsaid: in a folder that brings the code of a model, transformers would stop and ask.
        return AutoTokenizer.from_pretrained(tokenizer, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"TOKENIZER={tokenizer} cannot be opened by transformers: {str(error).strip().partition(chr(10))[0]}\n"
            f"  why: it writes conversations as text, by the tokenizer's chat template\n"
            f"  try: the folder of a tokenizer as save_pretrained leaves it"
        ) from None


class _Tally:
    """Counts and keeps what becomes of the samples."""

    def __init__(self, seq_length: int, over_long: OverLong) -> None:
        self.seq_length, self.over_long = seq_length, over_long
        self.count = dict.fromkeys(("longest", "over_long", "cut", "empty_answers", "split"), 0)
        self.kept: list[Sample] = []

    def with_answers(self, conversations: Iterator[Conversation]) -> Iterator[Conversation]:
        for conversation in conversations:
            if conversation.has_empty_answer:
                self.count["empty_answers"] += 1
            else:
                yield conversation

    def texts(self, parts: Iterable[list[Rendered]]) -> Iterator[Rendered]:
        for part in parts:
            self.count["split"] += len(part) > 1
            yield from part

    def add(self, sample: Sample) -> None:
        self.count["longest"] = max(self.count["longest"], sample.positions)
        if sample.positions > self.seq_length:
            self.count["over_long"] += 1
            sample = sample.cut(self.seq_length)
            if self.over_long == "drop" or not sample.learned[1:].any():
                return
            self.count["cut"] += 1
        self.kept.append(sample)


def _write(folder: Path, paths: list[str], chat: ChatTemplate, tally: _Tally, variable: str) -> None:
    backend = chat.tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    conversations = tally.with_answers(itertools.chain.from_iterable(map(read_conversations, paths)))
    for batch in itertools.batched(conversations, _BATCH):
        for sample in tokenize(backend, list(tally.texts(map(chat.render, batch)))):
            tally.add(sample)
    if not tally.kept:
        raise _nothing(paths, tally, variable)
    tokens = np.concatenate([sample.tokens for sample in tally.kept])
    learned = np.concatenate([sample.learned for sample in tally.kept])
    ends = np.cumsum([len(sample.tokens) for sample in tally.kept])
    report = Report(
        source=[str(Path(path).absolute()) for path in paths],
        samples=len(tally.kept),
        tokens=len(tokens) - len(ends),
        learned_tokens=sum(int(sample.learned[1:].sum()) for sample in tally.kept),
        largest_token=int(tokens.max()),
        template=chat.foreign,
        **tally.count,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part", dir=folder.parent))
    try:
        for name, array in (("tokens", tokens), ("learned", learned), ("ends", ends)):
            np.save(part / f"{name}.npy", array)
        (part / "report.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
        os.chmod(part, 0o755)  # of mkdtemp: for its owner alone
        if not folder.exists():
            os.rename(part, folder)
    except OSError:
        if not folder.exists():  # else another node was faster, with the same content
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _nothing(paths: list[str], tally: _Tally, variable: str) -> ValueError:
    names, count = ", ".join(paths), tally.count
    if not count["over_long"] and not count["empty_answers"]:
        return ValueError(
            f"{names} holds no sample\n"
            f"  why: every line is empty\n"
            f"  try: {variable}=<file>.jsonl, one JSON object a line"
        )
    longer = f"SEQ_LEN={count['longest']} holds the longest, and " if count["over_long"] else ""
    return ValueError(
        f"{names} has no sample that can be learned\n"
        f"  why: {count['over_long']} are longer than SEQ_LEN={tally.seq_length}, and {count['empty_answers']} have an "
        f"empty answer\n"
        f"  try: {longer or 'samples with answers, or '}OVER_LONG=truncate cuts what is longer"
    )

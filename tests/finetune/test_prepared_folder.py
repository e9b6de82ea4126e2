"""The folder of prepared samples: its counts, its tokens whatever the tokenizer file adds, all of it or nothing."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from linear_moe.data.instructions import prepare as preparing
from linear_moe.data.instructions.prepare import open_prepared, prepare
from linear_moe.data.instructions.report import Report
from linear_moe.data.tokenizer import describe_tokenizer
from tests.finetune.chat import chat_tokenizer, mixed_messages, prepared, write_lines


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return chat_tokenizer(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_lines(tmp_path_factory.mktemp("lines") / "lines.jsonl", mixed_messages(9))


def test_counts_are_those_of_the_samples(tokenizer: str, lines: str, tmp_path: Path):
    """Auxiliary losses are weighed by the share of learned tokens among those that take room in sequences."""
    samples = prepared(tokenizer, lines, tmp_path / "cache", 256)
    report, every = samples.report, [samples.sample(i) for i in range(9)]
    assert report.tokens == sum(len(sample.tokens) - 1 for sample in every) == samples.lengths.sum()
    assert report.learned_tokens == sum(int(sample.learned[1:].sum()) for sample in every)
    assert report.largest_token == max(int(sample.tokens.max()) for sample in every)
    assert report.longest == max(len(sample.tokens) - 1 for sample in every)
    assert [len(sample.tokens) - 1 for sample in every] == samples.lengths.tolist()
    assert np.concatenate([sample.tokens for sample in every]).tolist() == samples.tokens.tolist()
    assert isinstance(samples.tokens, np.memmap) and isinstance(samples.learned, np.memmap)


def test_what_a_person_is_told_of_the_samples():
    """Those read are those used, those dropped, and those cut, each once."""
    counts = {"samples": 10, "tokens": 0, "learned_tokens": 0, "largest_token": 0, "longest": 99, "split": 0}
    cut = Report(source=["/a/x.jsonl", "/b/y.jsonl"], over_long=5, cut=3, empty_answers=2, **counts)
    assert cut.notes(64) == [
        "x.jsonl, y.jsonl: 2 of 14 samples have an empty answer and are left out.",
        "x.jsonl, y.jsonl: 5 of 14 samples are longer than SEQ_LEN=64 and 3 are cut, and 2 left out; "
        "SEQ_LEN=99 holds all",
    ]
    dropped = Report(source=["x"], over_long=5, cut=0, empty_answers=0, **counts)
    assert dropped.notes(64) == [
        "x: 5 of 15 samples are longer than SEQ_LEN=64 and are left out; SEQ_LEN=99 holds all"
    ]


def test_truncation_and_padding_of_the_file_change_no_sample(tokenizer: str, lines: str, tmp_path: Path):
    """Some tokenizer.json keep those of their last use: answers would be lost, or end in padding."""
    from tokenizers import Tokenizer

    changed = tmp_path / "tok"
    chat_tokenizer(changed)
    backend = Tokenizer.from_file(str(changed / "tokenizer.json"))
    backend.enable_truncation(8)
    backend.enable_padding(length=300)
    backend.save(str(changed / "tokenizer.json"))
    expected = prepared(tokenizer, lines, tmp_path / "expected", 256)
    found = prepared(str(changed), lines, tmp_path / "found", 256)
    assert found.tokens.tolist() == expected.tokens.tolist() and found.report == expected.report


def test_the_folder_is_for_everyone_and_never_half(
    tokenizer: str, lines: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Written beside its place, for a rename to be possible; what was tokenized before is not announced again."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    told: list[str] = []
    for _ in range(2):
        samples = prepared(tokenizer, lines, tmp_path / "cache", 256, announce=told.append)
    assert told == [f"tokenizing {lines}"]
    assert samples.folder.stat().st_mode & 0o777 == 0o755
    assert list((tmp_path / "cache").iterdir()) == [samples.folder]


def test_another_node_that_was_faster_is_no_error(
    tokenizer: str, lines: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rename = os.rename

    def second(part: Path, folder: Path) -> None:
        rename(part, folder)
        raise OSError("not empty")

    def full(part: Path, folder: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(preparing.os, "rename", full)
    with pytest.raises(OSError, match="no space left"):
        prepared(tokenizer, lines, tmp_path / "cache", 256)
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(preparing.os, "rename", second)
    assert prepared(tokenizer, lines, tmp_path / "cache", 256).report.samples == 9


def test_everything_that_the_content_follows_from_names_the_folder(
    tokenizer: str, lines: str, tmp_path: Path
):
    def folder(**changes: object) -> str:
        options = {"fingerprint": "a", "seq_length": 256, "over_long": "drop", "template": None} | changes
        return prepare([lines], tokenizer, tmp_path / "cache", **options).folder.name  # type: ignore[arg-type]

    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    changes = [
        {},
        {"fingerprint": "b"},
        {"seq_length": 255},
        {"over_long": "truncate"},
        {"template": template},
    ]
    assert len({folder(**change) for change in changes}) == 5
    before = folder()
    config = Path(tokenizer, "tokenizer_config.json")
    text = config.read_text()
    config.write_text(json.dumps(json.loads(text) | {"more": 1}))  # the chat template may be there
    after = folder()
    config.write_text(text)
    assert before == folder() != after


def test_another_way_to_cut_text_is_another_folder(tokenizer: str, lines: str, tmp_path: Path):
    """With the same tokens, and so with the same fingerprint: the samples of the one are not those of the other."""
    changed = Path(chat_tokenizer(tmp_path / "tok"))
    content = json.loads((changed / "tokenizer.json").read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    (changed / "tokenizer.json").write_text(json.dumps(content))
    assert describe_tokenizer(str(changed)).fingerprint == describe_tokenizer(tokenizer).fingerprint
    cached, alone = (prepared(str(changed), lines, tmp_path / cache) for cache in ("cache", "alone"))
    before = prepared(tokenizer, lines, tmp_path / "cache")
    assert before.tokens.tolist() != cached.tokens.tolist() == alone.tokens.tolist()


@pytest.mark.parametrize("name", ["tokens.npy", "learned.npy", "ends.npy", "report.json"])
def test_a_folder_that_lacks_a_file_is_told(tokenizer: str, lines: str, tmp_path: Path, name: str):
    """Or the rest of a file, after a full disk."""
    folder = prepared(tokenizer, lines, tmp_path / "cache", 256).folder
    (folder / name).write_bytes((folder / name).read_bytes()[:-3])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"holds no prepared samples .*\n  why: .*\n  try: remove it"):
            open_prepared(folder)
        (folder / name).unlink(missing_ok=True)


def test_files_that_do_not_belong_together_are_told(tokenizer: str, lines: str, tmp_path: Path):
    folder = prepared(tokenizer, lines, tmp_path / "cache", 256).folder
    tokens = np.load(folder / "tokens.npy")
    np.save(folder / "tokens.npy", tokens[:-1])
    with pytest.raises(ValueError, match="holds no prepared samples"):
        open_prepared(folder)


def test_a_file_that_is_not_there_is_told(tokenizer: str, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"absent.jsonl cannot be read: No such file.*\n  why: .*\n  try: DATA=<"
    ):
        prepared(tokenizer, str(tmp_path / "absent.jsonl"), tmp_path / "cache", variable="DATA")

"""What is read of a tokenizer's files: how many tokens, which they are, whether two of them cut text alike."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from linear_moe.data.tokenizer import TokenizerError, added_tokens, describe_tokenizer, train_tokenizer
from tests.data.token_files import write_tokenizer


def changed(folder: Path, change: Callable[[dict[str, Any]], Any], name: str = "tokenizer.json") -> str:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))
    return str(folder)


def test_the_fingerprint_is_of_the_tokens_and_not_of_the_file(tmp_path: Path):
    info = write_tokenizer(tmp_path / "tok")

    def other_order(content: dict[str, Any]) -> None:
        content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))

    def other_merge(content: dict[str, Any]) -> None:
        content["model"]["merges"].reverse()

    def other_id(content: dict[str, Any]) -> None:
        names = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)[-2:]
        content["model"]["vocab"].update(dict(zip(names, (299, 298), strict=True)))

    assert describe_tokenizer(changed(tmp_path / "tok", other_order)).fingerprint == info.fingerprint
    found = {
        describe_tokenizer(changed(tmp_path / "tok", change)).fingerprint
        for change in (other_merge, other_id)
    }
    assert len(found | {info.fingerprint}) == 3


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        ({}, 1),
        ({"pad_token": {"content": "<|padding|>"}}, 1),
        ({"pad_token": None}, 0),
        ({"pad_token": "<|endoftext|>"}, 0),
        ({"pad_token": "<|not there|>"}, 0),
        ({"bos_token": "<|padding|>"}, 0),  # taken for padding, the first token of a prompt would not be read
    ],
)
def test_the_token_of_padding(tmp_path: Path, special: dict[str, Any], pad: int):
    write_tokenizer(tmp_path / "tok")
    info = describe_tokenizer(
        changed(tmp_path / "tok", lambda config: config.update(special), "tokenizer_config.json")
    )
    assert (info.eod, info.pad) == (0, pad)


def test_every_text_is_learned_from_once(tmp_path: Path):
    """The most frequent pair is joined first: counted twice, that of the first text would be it."""
    for kind in (list, iter):
        folder = tmp_path / kind.__name__
        train_tokenizer(kind(["", "abab", "cdcdcd"]), 259, str(folder))
        assert json.loads((folder / "tokenizer.json").read_text())["model"]["merges"] == [["c", "d"]]


def test_tokens_that_another_one_has_besides(tmp_path: Path):
    own, other = tmp_path / "own", tmp_path / "other"
    for folder in (own, other):
        write_tokenizer(folder)
    assert added_tokens(str(own), str(other)) == 0

    def as_one_text(content: dict[str, Any]) -> None:
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]

    assert added_tokens(str(own), changed(other, as_one_text)) == 0, "as older files write them"
    token = {"content": "<|more|>", "id": 300}
    changed(other, lambda content: content["added_tokens"].append(token))
    assert added_tokens(str(own), str(other)) == 1
    assert added_tokens(str(other), str(own)) is None, "it lacks one"
    changed(other, lambda content: content["model"]["merges"].reverse())
    assert added_tokens(str(own), str(other)) is None, "it cuts text otherwise"


def test_a_list_of_tokens_with_scores(tmp_path: Path):
    """As a unigram model has them; such a model has no merges, and an end-of-document token may be an object."""
    (tmp_path / "other").mkdir()
    for folder in (tmp_path, tmp_path / "other"):
        vocab = [["<unk>", 0.0], ["_a", -1.5], ["b", -2.0], ["</s>", 0.0]]
        added = [{"content": "</s>", "id": 3}]
        model = {"type": "Unigram", "vocab": vocab}
        (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}))
        (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    info = describe_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (info.path, info.base_vocab_size, info.vocab_size, info.eod) == (str(tmp_path), 3, 4, 3)
    changed(tmp_path / "other", lambda content: content.update(added_tokens=None))
    assert describe_tokenizer(str(tmp_path / "other")).base_vocab_size == 4
    assert added_tokens(str(tmp_path), str(tmp_path / "other")) == 0


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tokenizer_config.json", None, "has no tokenizer_config.json"),
        ("tokenizer_config.json", "{", "is not a tokenizer"),
        ("tokenizer_config.json", "{}", "names no end-of-document token"),
        ("tokenizer_config.json", '{"eos_token": "<|absent|>"}', "names no end-of-document token"),
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", "[]", "is not a tokenizer"),
        ("tokenizer.json", '{"model": {}}', "is not a tokenizer"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, content: str | None, problem: str):
    write_tokenizer(tmp_path / "tok")
    path = tmp_path / "tok" / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(TokenizerError, match=problem):
        describe_tokenizer(str(tmp_path / "tok"))

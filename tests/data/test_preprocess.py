"""From text to token files and back to the same text; all or nothing on disk."""

import errno
import gzip
import itertools
import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from linear_moe.data import preprocess as module
from linear_moe.data.corpus import check_inputs, python_documents, read_documents
from linear_moe.data.indexed import read_index, read_manifest, read_tokens
from linear_moe.data.preprocess import preprocess
from linear_moe.data.tokenizer import (
    END_OF_DOCUMENT,
    PADDING,
    TokenizerError,
    describe_tokenizer,
    train_tokenizer,
)
from tests.data.token_files import write_tokenizer

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "  leading spaces, \ttabs, and a word",
    "Grüße 漢字 🙂 \x00 control",
    f"a document that says {END_OF_DOCUMENT} in the middle",
    "x",
]


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[str, str]:
    """A JSONL file of TEXTS and a tokenizer folder."""
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)) + "\n"
    )
    return str(path), write_tokenizer(tmp_path / "tok").path


def decoded(prefix: str, tokenizer: str) -> list[str]:
    """The documents of token files, as text."""
    from tokenizers import Tokenizer

    decoder, data = Tokenizer.from_file(f"{tokenizer}/tokenizer.json"), IndexedDataset(prefix)
    eod = describe_tokenizer(tokenizer).eod
    assert all(document[-1] == eod and eod not in document[:-1] for document in data)
    return [decoder.decode(document[:-1], skip_special_tokens=False) for document in data]


def test_round_trip(tmp_path: Path, corpus: tuple[str, str]):
    prefix, manifest = preprocess([corpus[0]], str(tmp_path / "out" / "mine"), corpus[1])
    assert prefix == str(tmp_path / "out" / "mine_text_document")
    assert decoded(prefix, corpus[1]) == TEXTS
    assert read_manifest(prefix) == manifest
    assert (manifest.num_documents, manifest.num_tokens) == (5, len(read_tokens(prefix)))
    assert manifest.vocab_size == 300 and manifest.source == [corpus[0]]
    assert read_index(prefix).dtype == "uint16"


def test_tokens_of_large_vocabularies_are_wider(tmp_path: Path, corpus: tuple[str, str]):
    """Of 65500 tokens and more, of which the last ones may be added behind a gap."""
    path = Path(corpus[1], "tokenizer.json")
    content = json.loads(path.read_text())
    for last, dtype in ((65498, "uint16"), (65499, "int32")):
        far = {**content["added_tokens"][0], "id": last, "content": "<|far|>"}
        path.write_text(json.dumps(content | {"added_tokens": [*content["added_tokens"], far]}))
        prefix, manifest = preprocess([corpus[0]], str(tmp_path / dtype), corpus[1])
        assert (manifest.vocab_size, read_index(prefix).dtype) == (last + 1, dtype)
        assert decoded(prefix, corpus[1]) == TEXTS


def test_a_document_begins_as_a_prompt_does(tmp_path: Path, corpus: tuple[str, str]):
    """Generation and evaluation give text to the tokenizer as it is: what it puts in front has to be known."""
    from tokenizers import Tokenizer, processors
    from transformers import AutoTokenizer

    eod, file = describe_tokenizer(corpus[1]).eod, f"{corpus[1]}/tokenizer.json"
    tokenizer = Tokenizer.from_file(file)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{PADDING} $A", special_tokens=[(PADDING, 1)]),
        ]
    )
    tokenizer.save(file)
    prefix, _ = preprocess([corpus[0]], str(tmp_path / "mine"), corpus[1])
    documents = IndexedDataset(prefix)
    called = AutoTokenizer.from_pretrained(corpus[1])
    assert [list(documents[i]) for i in (0, 4)] == [[*called(TEXTS[i]).input_ids, eod] for i in (0, 4)]
    assert documents[4][0] == 1 and 1 not in documents[0][1:]


def test_plain_text_is_one_document(tmp_path: Path, corpus: tuple[str, str]):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    prefix, _ = preprocess([str(tmp_path / "a.txt"), corpus[0]], str(tmp_path / "mine"), corpus[1])
    assert decoded(prefix, corpus[1]) == ["one\ntwo\n", *TEXTS]


def test_nothing_is_overwritten_unasked(tmp_path: Path, corpus: tuple[str, str]):
    prefix, _ = preprocess([corpus[0]], str(tmp_path / "mine"), corpus[1])
    with pytest.raises(ValueError) as error:
        preprocess([corpus[0]], str(tmp_path / "mine"), corpus[1])
    assert str(error.value) == (
        f"{prefix}.bin or .idx exists.\n"
        "  why: token files are never replaced by accident; a run may be reading them.\n"
        "  try: --overwrite, or another --output-prefix"
    )
    assert preprocess([corpus[0]], str(tmp_path / "mine"), corpus[1], overwrite=True)[0] == prefix
    for suffix in (".idx", ".bin"):
        Path(prefix + suffix).rename(tmp_path / "away")
        with pytest.raises(ValueError, match=r"\.bin or \.idx exists"):
            preprocess([corpus[0]], str(tmp_path / "mine"), corpus[1])
        (tmp_path / "away").rename(prefix + suffix)


def test_a_failure_leaves_nothing_behind(tmp_path: Path, corpus: tuple[str, str]):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"bad\.jsonl:2 is not JSON"):
        preprocess([corpus[0], str(tmp_path / "bad.jsonl")], str(out / "mine"), corpus[1])
    assert list(out.iterdir()) == []


def test_what_is_not_there_is_told_before_anything_is_written(tmp_path: Path, corpus: tuple[str, str]):
    out = tmp_path / "out"
    for inputs, tokenizer, problem in (
        (
            [corpus[0], "absent.txt"],
            corpus[1],
            "absent.txt is not a file.\n  why: there is nothing of that name",
        ),
        ([str(tmp_path)], corpus[1], "is not a file.\n  why: it is a folder"),
        ([corpus[0]], "absent", "--tokenizer absent cannot be used: absent does not exist.\n  why: "),
    ):
        with pytest.raises(ValueError, match=re.escape(problem)):
            preprocess(inputs, str(out / "mine"), tokenizer)
        assert not out.exists()


@pytest.mark.parametrize("place", ["manifest_text", "read_index"])
def test_a_failure_keeps_the_old_files(
    tmp_path: Path, corpus: tuple[str, str], monkeypatch: pytest.MonkeyPatch, place: str
):
    preprocess([corpus[0]], str(tmp_path / "mine"), corpus[1])
    before = {path.name: path.read_bytes() for path in tmp_path.glob("mine*")}
    monkeypatch.setattr(module, place, lambda given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        preprocess([corpus[0]], str(tmp_path / "mine"), corpus[1], overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("mine*")} == before


def full_disk(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["add_document", "finalize"])
def test_a_full_disk_keeps_the_old_files(
    tmp_path: Path, corpus: tuple[str, str], monkeypatch: pytest.MonkeyPatch, place: str
):
    preprocess([corpus[0]], str(tmp_path / "mine"), corpus[1])
    before = {path.name: path.read_bytes() for path in tmp_path.glob("mine*")}
    monkeypatch.setattr(IndexedDatasetBuilder, place, full_disk)
    what = f"{tmp_path}/mine_text_document.bin and .idx cannot be written: No space left on device.\n  why: "
    with pytest.raises(ValueError, match=re.escape(what) + ".*\n  try: make room, or --output-prefix "):
        preprocess([corpus[0]], str(tmp_path / "mine"), corpus[1], overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("mine*")} == before


def test_a_full_disk_keeps_the_old_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "tok"
    train_tokenizer(["import os"], 258, str(folder))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write = Path.write_text

    def half(path: Path, text: str, **options: str) -> None:
        write(path, text[: len(text) // 2], **options)
        if path.name.startswith("tokenizer.json"):
            full_disk()

    monkeypatch.setattr(Path, "write_text", half)
    what = re.escape(f"{folder} cannot be written: No space left on device.\n  why: ")
    with pytest.raises(ValueError, match=what + ".*\n  try: make room, or --output "):
        train_tokenizer(["import sys" * 99], 260, str(folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"body": "x"}', "has no text under 'text'.\n  why: the line holds body."),
        ('["x"]', "has no text under 'text'.\n  why: the line holds a list, and each is one object."),
        (
            '{"text": 3}',
            "has no text under 'text'.\n  why: it is 3 there, and a text is a string.\n  try: the file ",
        ),
        ('{"text": null, "body": "x"}', "has no text under 'text'.\n  why: it is null there, and "),
        (
            '[{"text": "x"}]',
            "has no text under 'text'.\n  why: the line holds a list, and each is one object.\n  try: jq ",
        ),
        (
            '[\n{"text": "x"}\n]',
            "is not JSON (Expecting value).\n  why: a .jsonl file has one JSON object per line, "
            "and so has one that ends in .json.\n  try: jq -c '.[]' FILE > FILE.jsonl, if ",
        ),
        (
            "once upon a time",
            "is not JSON (Expecting value).\n  why: a .jsonl file has one JSON object per line, "
            "and so has one that ends in .json.\n  try: give plain text another suffix, .txt, ",
        ),
    ],
)
def test_lines_without_text(tmp_path: Path, line: str, problem: str):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError) as error:
        list(read_documents(str(tmp_path / "a.jsonl")))
    assert f"a.jsonl:1 {problem}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("a.jsonl.gz", "a.jsonl"),
        ("corpus", "corpus.unpacked.jsonl"),
        ("a.jsonl", "a.jsonl.unpacked.jsonl"),
    ],
)
def test_a_compressed_input_is_named(tmp_path: Path, name: str, plain: str):
    """Corpora are passed on so; as text in a wrong encoding it would be a riddle. No advice empties a file."""
    (tmp_path / name).write_bytes(gzip.compress(b'{"text": "x"}'))
    with pytest.raises(ValueError) as error:
        check_inputs([f"{tmp_path}/{name}"])
    assert str(error.value).startswith(f"{tmp_path}/{name} is compressed.\n  why: ")
    assert str(error.value).endswith(f"try: gzip -dc {tmp_path}/{name} > {tmp_path}/{plain}")


@pytest.mark.parametrize(("tool", "suffix"), [("gzip", ".gz"), ("zstd", ".zst"), ("xz", ".xz")])
def test_what_unpacks_an_input(tmp_path: Path, tool: str, suffix: str):
    """By the first bytes of what these programs write of a line."""
    start = {"gzip": b"\x1f\x8b\x08\x00", "zstd": b"\x28\xb5\x2f\xfd\x24", "xz": b"\xfd7zXZ\x00"}[tool]
    (tmp_path / f"a b.jsonl{suffix}").write_bytes(start)
    with pytest.raises(ValueError) as error:
        check_inputs([f"{tmp_path}/a b.jsonl{suffix}"])
    assert str(error.value).endswith(
        f"try: {tool} -dc '{tmp_path}/a b.jsonl{suffix}' > '{tmp_path}/a b.jsonl'"
    )


def test_an_input_of_somebody_else_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("x")

    def closed(path: str, mode: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("linear_moe.data.corpus.open", closed, raising=False)
    with pytest.raises(ValueError, match=r"a.txt cannot be read: Permission denied.\n  why: .*\n  try: "):
        check_inputs([f"{tmp_path}/a.txt"])


def test_what_is_no_utf_8_is_named(tmp_path: Path):
    """A byte, or half of an escaped pair; a mark of UTF-8 in front is none of the text."""
    lines = {"a": b'{"text": "x"}\n{"text": "\xff"}\n', "b": b'{"text": "x"}\n{"text": "\\ud83d"}\n'}
    for name, content in lines.items():
        (tmp_path / f"{name}.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}.jsonl:2 holds what is no text .*\n  why: .*\n  try: "):
            list(read_documents(str(tmp_path / f"{name}.jsonl")))
    with pytest.raises(
        ValueError, match=r"try: the line without '\\ud83d', which is half of an escaped pair"
    ):
        list(read_documents(str(tmp_path / "b.jsonl")))
    (tmp_path / "w.txt").write_bytes("café".encode("utf-16"))
    with pytest.raises(ValueError, match=r"try: iconv -f UTF-16 -t UTF-8; or the file without that line"):
        list(read_documents(str(tmp_path / "w.txt")))
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    with pytest.raises(
        ValueError, match=r"c.txt holds what is no text in UTF-8 \(.*, at place 3\).\n  why: "
    ):
        list(read_documents(str(tmp_path / "c.txt")))
    for name, content in {"d.txt": "x", "e.jsonl": '{"text": "x"}\n'}.items():
        (tmp_path / name).write_bytes(content.encode("utf-8-sig"))
        assert list(read_documents(str(tmp_path / name))) == ["x"]


def test_it_says_how_far_it_is(tmp_path: Path, corpus: tuple[str, str], monkeypatch: pytest.MonkeyPatch):
    told: list[str] = []
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n' * 3)
    preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "short"), corpus[1], tell=told.append)
    assert told == [], "a short one has nothing to say"
    monkeypatch.setattr("linear_moe.data.preprocess._SILENCE", 0.0)
    _, manifest = preprocess([str(tmp_path / "a.jsonl")], str(tmp_path / "long"), corpus[1], tell=told.append)
    assert len(told) == 3 and told[-1] == f"3 documents, {manifest.num_tokens} tokens so far"


def test_an_empty_input_is_an_error(tmp_path: Path, corpus: tuple[str, str]):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match="holds no document"):
        preprocess([str(tmp_path / "empty.jsonl")], str(tmp_path / "mine"), corpus[1])
    assert not list(tmp_path.glob("mine*"))


def test_prompts_of_a_batch_end_together(tmp_path: Path):
    """What generate() of transformers goes on from; padded on the right, it would go on from the padding."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "tok").path)
    batch = tokenizer(["x", "a longer one"], padding=True)
    assert [row[-1] for row in batch["attention_mask"]] == [1, 1] and batch["attention_mask"][0][0] == 0


def test_the_tokenizer_opens_in_megatron(tmp_path: Path):
    from megatron.core.tokenizers import MegatronTokenizer

    info = train_tokenizer(TEXTS * 5, 290, str(tmp_path / "tok"))
    theirs = MegatronTokenizer.from_pretrained(info.path, metadata_path={"library": "huggingface"})
    assert (theirs.vocab_size, theirs.eod) == (info.vocab_size, info.eod)
    assert theirs.pad != theirs.eod, "Megatron masks the loss of pads: documents would never learn to end"
    for text in TEXTS[:3]:
        assert theirs.detokenize(theirs.tokenize(text)) == text


@pytest.mark.parametrize(
    ("texts", "size", "text"),
    [(TEXTS, 257, "is 257"), (TEXTS, -3, "is -3"), ([], 300, "no text"), (["", ""], 300, "no text")],
)
def test_a_tokenizer_of_nothing_is_refused(tmp_path: Path, texts: list[str], size: int, text: str):
    with pytest.raises(ValueError, match=rf"{text}.*\n  why: .*\n  try: "):
        train_tokenizer(texts, size, str(tmp_path / "tok"))
    assert not (tmp_path / "tok").exists()
    assert train_tokenizer(["x"], 258, str(tmp_path / "tok")).vocab_size == 258


def test_base_vocabulary_leaves_out_added_tokens(tmp_path: Path):
    info = write_tokenizer(tmp_path / "tok")
    path = tmp_path / "tok" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 305, "content": "<|im_start|>"})
    path.write_text(json.dumps(content))
    changed = describe_tokenizer(info.path)
    assert (changed.base_vocab_size, changed.vocab_size) == (298, 306)
    assert changed.fingerprint != info.fingerprint


def test_a_folder_that_is_no_tokenizer(tmp_path: Path):
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        describe_tokenizer(str(tmp_path))


def test_the_python_corpus_is_large_enough_and_repeatable():
    documents = list(python_documents())
    assert documents[:150] == list(itertools.islice(python_documents(), 150))
    assert sum(map(len, documents)) > 5_000_000


def test_the_tools_from_text_to_token_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def run(tool: str, *words: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", [tool, *words])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(Path(__file__).parents[2] / "tools" / tool), run_name="__main__")
        assert stop.value.code == code
        out, err = capsys.readouterr()
        return out + err

    corpus, tok, prefix = str(tmp_path / "python.jsonl"), str(tmp_path / "tok"), str(tmp_path / "python")
    assert "Python Software Foundation licence" in run("build_corpus.py", corpus, "--max-bytes", "300000")
    train = ("train_tokenizer.py", "--vocab-size", "512", "--output", tok, "--input")
    assert "512 tokens" in run(*train, corpus)
    assert f"{tok} holds a tokenizer" in run(*train, corpus, code=2), "and data written with it"
    assert "512 tokens" in run(*train, corpus, "--overwrite")
    assert "absent.txt is not a file.\n  why: there is nothing" in run(*train, "absent.txt", code=2)
    preprocess_data = ("preprocess_data.py", "--input", corpus, "--output-prefix", prefix, "--tokenizer", tok)
    told = run(*preprocess_data)
    assert f"DATASET_PATH={prefix}_text_document TOKENIZER={tok}" in told and "empty" not in told
    with open(corpus, "a") as lines:
        lines.write('{"text": ""}\n\n{"text": ""}\n')
    assert "; 2 empty ones left out\n" in run(*preprocess_data, "--overwrite")
    assert run(*preprocess_data, code=2).startswith("linear_moe: ")
    assert run(*preprocess_data, "--overwrite", "--workers", "-1", code=2).startswith(
        "linear_moe: --workers is -1\n"
    )
    metrics = tmp_path / "metrics.jsonl"
    records = [{"iteration": i, "lm_loss": 6 - i / 10, "tokens": 1000} for i in range(30)]
    records += [{"iteration": 29, "validation_loss": 4.0, "validation_perplexity": 54.6}]
    metrics.write_text('{"iteration": 0, "lm_')
    assert f"{metrics} has no step\n  why: " in run("plot_loss.py", str(metrics), code=2)
    metrics.write_text("x\n")
    assert f"{metrics} cannot be read: " in run("plot_loss.py", str(metrics), code=2)
    unfinished = '{"iteration": 30, "lm_loss": 2.9'
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records) + unfinished)
    assert f"no {tmp_path / 'absent'}\n  why: " in run("plot_loss.py", str(tmp_path / "absent"), code=2)
    assert "no absent.bin\n  why: " in run("plot_loss.py", str(metrics), "--data", "absent", code=2)
    run("plot_loss.py", str(metrics), "--data", f"{prefix}_text_document")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")

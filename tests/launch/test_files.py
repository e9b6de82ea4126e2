"""Checks against files: data, tokenizer, the disk."""

import shutil
import struct
from collections import namedtuple
from pathlib import Path

import pytest

from linear_moe.launch.megatron_args import held_out_documents, training_arguments
from tests.data.token_files import write_tokenizer
from tests.launch.plans import make_plan, message


def test_good_data(data: dict[str, str]):
    assert message(**data) == ""


def test_the_tokenizer_is_asked_for(data: dict[str, str]):
    assert message(DATASET_PATH=data["DATASET_PATH"]) == (
        f"TOKENIZER is not set, and DATASET_PATH={data['DATASET_PATH']} holds tokens of some tokenizer.\n"
        "  why: the vocabulary of the model and the end of a document come from the tokenizer.\n"
        f"  try: TOKENIZER={data['TOKENIZER']}"
    )


def test_no_document_is_left_for_evaluation(data: dict[str, str]):
    assert message(**data | {"EVAL_ITERS": "10"}) == (
        f"DATASET_PATH={data['DATASET_PATH']} has 1 document(s), too few to hold one out.\n"
        "  why: evaluation reads 1 % of the documents, rounded.\n"
        "  try: EVAL_ITERS=0 to train on all of them, or more than 50 documents"
    )
    flags = training_arguments(make_plan(**data))
    assert flags[flags.index("--split") + 1] == "100,0,0", "Megatron would count epochs of no token for ever"
    assert [held_out_documents(count) for count in (50, 51, 250)] == [0, 1, 2]


def test_a_tokenizer_trained_anew_under_the_same_name(data: dict[str, str], tmp_path: Path):
    write_tokenizer(tmp_path / "tok", 280)
    assert "which has changed since, TOKENIZER 280" in message(**data)
    assert message(**data).endswith(f"\n  try: preprocess the text again with {tmp_path}/tok")


def test_missing_prefix(data: dict[str, str], tmp_path: Path):
    data["DATASET_PATH"] = str(tmp_path / "your")
    assert message(**data) == (
        f"DATASET_PATH={tmp_path}/your: there is no {tmp_path}/your.bin.\n"
        "  why: DATASET_PATH is the path of a .bin/.idx pair without its suffix, often ending in _text_document.\n"
        f"  try: DATASET_PATH={tmp_path}/mine"
    )


def test_the_prefix_that_was_meant(data: dict[str, str], tmp_path: Path):
    """With a suffix, or a letter off, among others that come before it."""
    for suffix in (".bin", ".idx"):
        shutil.copy(tmp_path / f"mine{suffix}", tmp_path / f"another{suffix}")
        assert message(**data | {"DATASET_PATH": f"{tmp_path}/mine{suffix}"}).endswith(
            f"\n  try: DATASET_PATH={tmp_path}/mine"
        )
    assert message(**data | {"DATASET_PATH": f"{tmp_path}/mime"}).endswith(
        f"\n  try: DATASET_PATH={tmp_path}/mine (also there: another)"
    )


def test_half_a_pair_a_folder_and_spaces(data: dict[str, str], tmp_path: Path):
    shutil.copytree(tmp_path, tmp_path / "my data", ignore=shutil.ignore_patterns("my data"))
    spaced = {**data, "DATASET_PATH": f"{tmp_path}/my data/mine"}
    assert message(**spaced) == ""
    flags = training_arguments(make_plan(**spaced))
    assert flags[flags.index("--data-path") + 1 :][:2] == [spaced["DATASET_PATH"], "--data-cache-path"]
    assert message(**{**data, "DATASET_PATH": f"{tmp_path}/"}).endswith(
        f"\n  try: DATASET_PATH={tmp_path}/mine"
    )
    (tmp_path / "mine.bin").unlink()
    assert f"there is no {tmp_path}/mine.bin." in message(**data)
    assert message(**data).endswith("\n  try: copy the other of the two files there, too")
    gone = message(**{**data, "DATASET_PATH": f"{tmp_path}/my data/gone"})
    assert f"DATASET_PATH={tmp_path}/my: there is no" in gone and "; a space separates two of them." in gone


def test_truncated_bin(data: dict[str, str], tmp_path: Path):
    with open(tmp_path / "mine.bin", "r+b") as stream:
        stream.truncate(1000)
    assert message(**data) == (
        f"DATASET_PATH={tmp_path}/mine cannot be read: {tmp_path}/mine.bin has 1000 bytes, but mine.idx describes 4000 "
        "(2000 tokens of uint16).\n"
        "  why: the copy or the preprocessing was cut short.\n"
        "  try: copy it again, or python tools/preprocess_data.py ... --overwrite"
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"not an index", "is not a Megatron index: it does not start with MMIDIDX"),
        (b"", "is not a Megatron index: it does not start with MMIDIDX"),
        (
            b"MMIDIDX\0\0" + bytes([9] + [0] * 24),
            "has version 9 and token type 0, unknown to Megatron-Core 0.19",
        ),
    ],
)
def test_broken_index(data: dict[str, str], tmp_path: Path, content: bytes, problem: str):
    (tmp_path / "mine.idx").write_bytes(content)
    assert f"mine.idx {problem}." in message(**data)


def test_too_little_data(data: dict[str, str]):
    text = message(**data, CP="1") + message(**{**data, "SEQ_LEN": "2048"})
    assert "has 2000 tokens, less than one sequence.\n  why: a sample is SEQ_LEN + 1 = 2049 tokens." in text


def test_data_of_another_tokenizer(data: dict[str, str], tmp_path: Path):
    other = write_tokenizer(tmp_path / "other", vocab_size=310)
    assert message(**{**data, "TOKENIZER": other.path}) == (
        f"DATASET_PATH={tmp_path}/mine was written with another tokenizer than TOKENIZER={tmp_path}/other.\n"
        f"  why: the data has vocabulary 300 of {tmp_path}/tok, TOKENIZER 310, and their tokens mean different text.\n"
        f"  try: TOKENIZER={tmp_path}/tok, or preprocess the text again with {tmp_path}/other"
    )


def test_a_copy_of_the_tokenizer_is_the_same_tokenizer(data: dict[str, str], tmp_path: Path):
    shutil.copytree(tmp_path / "tok", tmp_path / "copy")
    assert message(**{**data, "TOKENIZER": str(tmp_path / "copy" / "tokenizer.json")}) == ""


def test_tokens_beyond_the_vocabulary_without_a_manifest(data: dict[str, str], tmp_path: Path):
    (tmp_path / "mine.json").unlink()
    assert message(**data) == ""
    assert message(**{**data, "TOKENIZER": "null", "VOCAB_SIZE": "299"}) == (
        f"DATASET_PATH={tmp_path}/mine has token 299, but the vocabulary of TOKENIZER=null ends at 298.\n"
        "  why: data and model have to share one tokenizer.\n"
        "  try: TOKENIZER=<the tokenizer that wrote the data>, or VOCAB_SIZE=300"
    )


def test_tokens_of_a_manifest_without_a_tokenizer(data: dict[str, str]):
    """The manifest says how many there may be, whatever the first of them are."""
    for size, is_enough in ((300, True), (299, False)):
        told = message(**{**data, "TOKENIZER": "null", "VOCAB_SIZE": str(size)})
        assert (told == "") is is_enough
    assert told.startswith(
        f"DATASET_PATH={data['DATASET_PATH']} has token 299, but the vocabulary of TOKENIZER=null"
    )


@pytest.mark.parametrize(("documents", "is_enough"), [(50, False), (51, True)])
def test_documents_for_an_evaluation(data: dict[str, str], documents: int, is_enough: bool):
    """Of 2000 tokens: all but one have one, the last one the rest."""
    path = Path(data["DATASET_PATH"] + ".idx")
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, documents, documents + 1)
    lengths = [1] * (documents - 1) + [2001 - documents]
    starts = [2 * i for i in range(documents)]
    path.write_bytes(
        head
        + struct.pack(f"<{documents}i{documents}q{documents + 1}q", *lengths, *starts, *range(documents + 1))
    )
    told = message(**data | {"EVAL_ITERS": "10"})
    assert (told == "") is is_enough and message(**data) == ""
    assert is_enough or f"has {documents} document(s), too few" in told


def test_every_part_of_a_blend_is_checked(data: dict[str, str], tmp_path: Path):
    blend = f"0.5 {tmp_path}/mine 0.5 {tmp_path}/gone"
    assert f"DATASET_PATH={tmp_path}/gone: there is no" in message(**{**data, "DATASET_PATH": blend})


@pytest.mark.parametrize("words", ["0.3 {p} 0.7", "30% {p} 70% {p}", "{p} 0.7", "1 2"])
def test_what_is_no_blend_though_it_has_weights(data: dict[str, str], words: str):
    found = message(**{**data, "DATASET_PATH": words.format(p=data["DATASET_PATH"])})
    assert " is no blend.\n  why: a blend is a number and a prefix in turn" in found
    count = words.count("{p}")
    each = f"{1 / max(count, 1):.2g} {data['DATASET_PATH'] if count else '<prefix>'}"
    assert found.endswith(f"try: DATASET_PATH='{' '.join([each] * max(count, 1))}'")


@pytest.mark.parametrize("weights", [("0", "1"), ("-0.5", "1.5"), ("nan", "1"), ("1", "inf")])
def test_weights_of_a_blend_are_positive(data: dict[str, str], weights: tuple[str, str]):
    path = data["DATASET_PATH"]
    found = message(**{**data, "DATASET_PATH": f"{weights[0]} {path} {weights[1]} {path}"})
    assert "has a weight that is not a positive number" in found
    assert found.endswith(f"try: DATASET_PATH='1 {path} 1 {path}'")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda folder: shutil.rmtree(folder), "does not exist"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "has no tokenizer_config.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "is not a tokenizer"),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text("{}"),
            "names no end-of-document token",
        ),
    ],
)
def test_broken_tokenizer(data: dict[str, str], tmp_path: Path, spoil, problem: str):
    spoil(tmp_path / "tok")
    text = message(**data)
    assert text.startswith(f"TOKENIZER={tmp_path}/tok cannot be used: {tmp_path}/tok {problem}")


def test_a_tokenizer_is_no_checkpoint(data: dict[str, str], tmp_path: Path):
    assert message(PRETRAIN_CHECKPOINT_PATH=data["TOKENIZER"]) == (
        f"PRETRAIN_CHECKPOINT_PATH={tmp_path}/tok holds no checkpoint.\n"
        "  why: it holds a tokenizer, which has its own variable now.\n"
        f"  try: TOKENIZER={tmp_path}/tok PRETRAIN_CHECKPOINT_PATH=none"
    )


def test_no_space_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**7))
    assert message(OUTPUT_BASEPATH=str(tmp_path)) == (
        f"{tmp_path} has 0.01 GB free; one checkpoint needs about 0.02 GB.\n"
        "  why: 0.001B parameters x 16 bytes (weights and optimizer), and 10 %.\n"
        "  try: OUTPUT_BASEPATH=<a larger disk>, or SAVE_INTERVAL=0 to save nothing"
    )


def test_output_that_is_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert message(OUTPUT_BASEPATH=str(tmp_path / "file")).startswith(f"cannot write to {tmp_path}/file.")

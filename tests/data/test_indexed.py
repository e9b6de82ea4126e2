"""Token files: our reader against Megatron's writer, and the numbers taken from them."""

import math
from pathlib import Path

import numpy as np
import pytest

from linear_moe.data.indexed import (
    CorruptDataError,
    read_index,
    read_manifest,
    read_tokens,
    unigram_entropy,
)
from tests.data.token_files import write_tokenizer, write_tokens


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_what_megatron_writes(tmp_path: Path, dtype: type):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=dtype)
    documents = [np.arange(5), np.arange(7, 19), np.array([3])]
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "a.idx"))
    info = read_index(str(tmp_path / "a"))
    assert (info.dtype, info.num_documents, info.num_tokens) == (np.dtype(dtype).name, 3, 18)
    np.testing.assert_array_equal(read_tokens(str(tmp_path / "a")), np.concatenate(documents))
    np.testing.assert_array_equal(read_tokens(str(tmp_path / "a"), 6), [0, 1, 2, 3, 4, 7])


def test_what_our_tests_write_megatron_reads(tmp_path: Path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = write_tokens(tmp_path / "a", np.arange(50), write_tokenizer(tmp_path / "tok"))
    theirs = IndexedDataset(prefix)  # its arrays are views of a map that ends with it
    np.testing.assert_array_equal(theirs[0], np.arange(50))


def test_a_manifest_is_optional_but_not_arbitrary(tmp_path: Path):
    assert read_manifest(str(tmp_path / "none")) is None
    (tmp_path / "bad.json").write_text('{"hello": 1}')
    with pytest.raises(CorruptDataError, match="is not a manifest"):
        read_manifest(str(tmp_path / "bad"))


def damage(path: Path, place: int, value: bytes) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:place] + value + content[place + len(value) :])


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        (0, b"MMIDIDY", "a.idx is not a Megatron index: it does not start with MMIDIDX"),
        (9, b"\2", "a.idx has version 2 and token type 8, unknown to Megatron"),
        (17, b"\x09", "a.idx has version 1 and token type 9, unknown to Megatron"),
        (17, b"\4", "a.bin has 100 bytes, but a.idx describes 200 \\(50 tokens of int32\\)"),
        (34, b"\x33", "a.bin has 100 bytes, but a.idx describes 102 \\(51 tokens of uint16\\)"),
    ],
)
def test_an_index_that_its_tokens_do_not_fit(tmp_path: Path, place: int, value: bytes, problem: str):
    """Bytes of the header: magic 0 to 8, version 9 to 16, type 17, sequences, document ends, then lengths."""
    prefix = write_tokens(tmp_path / "a", np.arange(50), write_tokenizer(tmp_path / "tok"))
    damage(tmp_path / "a.idx", place, value)
    with pytest.raises(CorruptDataError, match=problem):
        read_index(prefix)


@pytest.mark.parametrize("size", [0, 33, 34, 45, 61])
def test_an_index_that_was_cut_off(tmp_path: Path, size: int):
    """Of 62 bytes: 34 are the header, 12 of each sequence, 8 of each end."""
    prefix = write_tokens(tmp_path / "a", np.arange(50), write_tokenizer(tmp_path / "tok"))
    whole = (tmp_path / "a.idx").read_bytes()
    assert len(whole) == 62
    (tmp_path / "a.idx").write_bytes(whole[:size])
    problem = f"is cut off: {size} bytes of 62" if size >= 34 else "is not a Megatron index"
    with pytest.raises(CorruptDataError, match=problem):
        read_index(prefix)


def test_no_tokens_are_no_tokens(tmp_path: Path):
    """A file of no bytes cannot be mapped."""
    prefix = write_tokens(tmp_path / "a", np.arange(0), write_tokenizer(tmp_path / "tok"))
    tokens = read_tokens(prefix)
    assert tokens.shape == (0,) and tokens.dtype == np.uint16
    full = write_tokens(tmp_path / "b", np.arange(50), write_tokenizer(tmp_path / "tok"))
    assert len(read_tokens(full, 0)) == 0 and len(read_tokens(full, 51)) == 50


def test_unigram_entropy(tmp_path: Path):
    tokenizer = write_tokenizer(tmp_path / "tok")
    uniform = write_tokens(tmp_path / "u", np.arange(1600) % 16, tokenizer)
    assert unigram_entropy(uniform) == pytest.approx(math.log(16))
    skewed = write_tokens(tmp_path / "s", np.array([0, 0, 0, 7]), tokenizer)
    assert unigram_entropy(skewed) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))

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


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
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


def test_unigram_entropy(tmp_path: Path):
    tokenizer = write_tokenizer(tmp_path / "tok")
    uniform = write_tokens(tmp_path / "u", np.arange(1600) % 16, tokenizer)
    assert unigram_entropy(uniform) == pytest.approx(math.log(16))
    skewed = write_tokens(tmp_path / "s", np.array([0, 0, 0, 7]), tokenizer)
    assert unigram_entropy(skewed) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))

"""Parts of imports and exports that a whole one does not show: rows of experts, vocabularies, lost tokenizers."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.token_files import write_tokenizer


def carried(rank: int, world: int) -> tuple[list[Any], str]:
    """Where the tensors of an expert and of all lie in ours; and two of which ours would be one have two dtypes."""
    from linear_moe.checkpoint.hf_folder import Stored
    from linear_moe.checkpoint.importing import _carried_piece
    from linear_moe.checkpoint.tables import Row
    from linear_moe.checkpoint.transforms import Halves

    stored = {
        name: Stored(Path("file"), dtype, (2, 3), 0)
        for name, dtype in (("a", torch.float32), ("b", torch.bfloat16), ("c", torch.float32))
    }
    found = []
    for row, size in (
        (Row("key", ("a", "c"), Halves()), (4, 3)),
        (Row("key", ("a", "c"), Halves(), 5), (8, 4, 3)),
    ):
        piece = _carried_piece(row, size, stored)
        found.append((piece.key, piece.whole_shape, piece.offset, piece.shape, piece.dtype))
    try:
        _carried_piece(Row("key", ("a", "b"), Halves()), (4, 3), stored)
    except ValueError as error:
        return found, str(error)
    return found, ""


def test_where_tensors_of_a_source_lie(gloo):
    (whole, expert), told = gloo(1, carried)[0]
    assert whole == ("key", (4, 3), (0, 0), (4, 3), torch.float32)
    assert expert == ("key", (8, 4, 3), (5, 0, 0), (1, 4, 3), torch.float32)
    assert told.startswith("a, b have different dtypes: torch.bfloat16, torch.float32\n  why: ")


def test_a_file_of_weights_is_as_full_as_it_may_be():
    """A tensor that is larger than a file gets one of its own; a model of one file has no number in its name."""
    from linear_moe.checkpoint.hf_folder import Planned, shards

    sizes = {"a": 9, "b": 2, "c": 2, "d": 1, "e": 4}
    tensors = {name: Planned(torch.float32, (size,)) for name, size in sizes.items()}
    assert list(shards(tensors, 16).values()) == [["a"], ["b", "c"], ["d"], ["e"]]
    groups = shards(tensors, 20)
    assert list(groups.values()) == [["a"], ["b", "c", "d"], ["e"]]
    assert list(groups) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert shards(tensors, 72) == {"model.safetensors": list(sizes)}


def exported(rank: int, world: int, root: str) -> dict[str, Any]:
    from linear_moe.checkpoint.exporting import _tokenizer_folder, _vocabulary

    run, own, moved = Path(root) / "run", Path(root) / "run" / "tokenizer", Path(root) / "moved"

    def saved(
        path: Path | None, kind: str = "HuggingFaceTokenizer", size: int | None = None
    ) -> dict[str, Any]:
        model = {"padded_vocab_size": 384}
        tokenizer = {"tokenizer_type": kind, "tokenizer_model": path and str(path), "vocab_size": size}
        return {"tokenizer": tokenizer, "architecture": model}

    found: dict[str, Any] = {"own": _tokenizer_folder(run, saved(moved), None)}
    found["rows"] = _vocabulary(saved(moved), own, 384), _vocabulary(saved(moved), own, 256)
    shutil.move(own, moved)
    found["moved"] = _tokenizer_folder(run, saved(moved), None)
    found["gone"] = _tokenizer_folder(run, saved(Path(root) / "gone"), None)
    found["none"] = _tokenizer_folder(run, saved(None), None)
    found["null"] = [
        _vocabulary(saved(None, "NullTokenizer", size), None, 384) for size in (100, 383, 384, None)
    ]
    found["unknown"] = _vocabulary(saved(Path(root) / "gone"), None, 384)
    try:
        _tokenizer_folder(run, saved(moved), run)
    except ValueError as error:
        found["told"] = str(error)
    return found


def test_the_tokenizer_and_the_rows_of_an_export(gloo, tmp_path: Path):
    """The run's copy, or where the training found it; as many rows as it has tokens, all where none is there."""
    write_tokenizer(tmp_path / "run" / "tokenizer")
    found = gloo(1, exported, str(tmp_path))[0]
    assert found["own"] == (tmp_path / "run" / "tokenizer", []) and found["moved"] == (tmp_path / "moved", [])
    assert found["rows"] == (300, 256) and found["unknown"] == 384
    assert found["null"] == [101, 384, 384, 384], "the tokens, and one that ends a document"
    (folder, (warning,)), (other, (shorter,)) = found["gone"], found["none"]
    assert folder is other is None and warning.startswith("the run has no tokenizer (")
    assert warning.endswith("rows that pad the vocabulary are exported, too, and may be generated")
    assert shorter.endswith("or give --tokenizer"), "there is nothing to look for"
    assert re.fullmatch(r"--tokenizer \S+/run is none: [^\n]+\n  why: [^\n]+\n  try: [^\n]+", found["told"])


@pytest.mark.parametrize("known", ["generation_config.json", None])
def test_how_an_exported_model_ends_its_texts(gloo, tmp_path: Path, known: str | None):
    """As the model did that it was imported from; else with the end of a document, and pads with its own token."""
    info = write_tokenizer(tmp_path / "run" / "tokenizer")
    (tmp_path / "out").mkdir()
    if known is not None:
        (tmp_path / "run" / "hugging_face").mkdir()
        (tmp_path / "run" / "hugging_face" / known).write_text('{"eos_token_id": [7, 9]}')
    gloo(1, rest_of, str(tmp_path))
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == ([7, 9] if known else info.eod)
    assert written.get("pad_token_id") == (None if known else info.pad) and info.pad == 1 != info.eod
    assert {"config.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


def rest_of(rank: int, world: int, root: str) -> None:
    from linear_moe.checkpoint.exporting import _write_rest

    run = Path(root) / "run"
    _write_rest(Path(root) / "out", run, {"vocab_size": 300}, run / "tokenizer", is_native=True)

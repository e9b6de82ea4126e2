"""``config.json`` of a run: what it says of the model, and what is told of one that is none."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch

from linear_moe.launch.resume import read_config as read_leniently
from linear_moe.training.run import FORMAT, read_config, write_config


def arguments(folder: Path) -> argparse.Namespace:
    (folder / "tok").mkdir()
    tokenizer = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "tok", "vocab_size": 300}
    model = {"num_layers": 2, "hidden_size": 64, "seq_length": 128, "params_dtype": torch.bfloat16}
    return argparse.Namespace(**tokenizer, **model, layer_kinds=["gla", "softmax"])


def test_what_is_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The folder of the tokenizer as seen from anywhere; nothing half written under the name."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "a" / "run"
    write_config(run, arguments(tmp_path), ["--lr", "1"])
    config = read_config(run)
    assert [path.name for path in run.iterdir()] == ["config.json"]
    assert config["tokenizer"]["tokenizer_model"] == str(tmp_path / "tok")
    assert (config["params_dtype"], config["seq_length"]) == ("bfloat16", 128)
    assert config["arguments"] == ["--lr", "1"]
    assert config["architecture"]["layer_kinds"] == ["gla", "softmax"]
    assert config["architecture"]["hidden_size"] == 64
    assert torch.__version__.startswith(config["versions"]["torch"])


def test_a_tokenizer_that_is_no_file_keeps_its_name(tmp_path: Path):
    args = arguments(tmp_path)
    args.tokenizer_model = "some/model"
    write_config(tmp_path, args, [])
    assert read_config(tmp_path)["tokenizer"]["tokenizer_model"] == "some/model"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "is not a run: it has no config.json"),
        (b"{", "config.json cannot be read: JSONDecodeError"),
        (b"\xff{}", "config.json cannot be read: UnicodeDecodeError"),
        (b"[]", "config.json cannot be read: TypeError"),
        (b"{}", "config.json cannot be read: KeyError: 'format'"),
        (
            json.dumps({"format": FORMAT + 1}).encode(),
            f"has format {FORMAT + 1}, this version reads {FORMAT}",
        ),
    ],
    ids=["none", "cut", "bytes", "list", "empty", "later"],
)
def test_what_is_no_config(tmp_path: Path, content: bytes | None, problem: str):
    """The launcher, which looks before anything is loaded, takes it for a run of another tool."""
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_config(tmp_path)
    assert re.fullmatch(r"[^\n]+\n  why: [^\n]+\n  try: [^\n]+", str(error.value)) and problem in str(
        error.value
    )
    assert read_leniently(tmp_path).keys() <= {"format"}

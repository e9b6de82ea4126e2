"""Folders to convert that are damaged, or have no room: what is told of each."""

import json
import re
import shutil
import struct
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from linear_moe.checkpoint import folders
from linear_moe.checkpoint.hf_config import describe_folder, read_config
from linear_moe.checkpoint.hf_folder import stored_tensors

TENSORS = {"a": torch.arange(12.0).reshape(4, 3), "b": torch.arange(5, dtype=torch.float16)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files and their index."""
    for name, tensor in TENSORS.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in TENSORS}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def with_header(path: Path, header: bytes) -> None:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def refused(function: Any, *arguments: Any) -> str:
    with pytest.raises(ValueError) as error:
        function(*arguments)
    text = str(error.value)
    assert re.fullmatch(r"(?s)[^\n]+\n  why: [^\n]+\n  try: [^\n]+", text), text
    return text


def test_whole_files_are_read(folder: Path):
    found = stored_tensors(folder)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        again = found[name].read(name)
        assert again.dtype == tensor.dtype and torch.equal(again, tensor)
        assert found[name].size == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("header", [b"[]", b"3", b'{"a": 3}', b'{"a": {"dtype": "F32", "shape": [1]}}'])
def test_a_header_of_other_things_than_tensors(folder: Path, header: bytes):
    with_header(folder / "a.safetensors", header)
    assert "a.safetensors is damaged: its header does not describe tensors" in refused(stored_tensors, folder)


@pytest.mark.parametrize("header", [b"{", b"\xff\xff", b'{"a": '])
def test_a_header_that_is_no_json(folder: Path, header: bytes):
    with_header(folder / "a.safetensors", header)
    assert "a.safetensors is damaged: its header is no JSON" in refused(stored_tensors, folder)


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_without_a_header(folder: Path, size: int):
    (folder / "a.safetensors").write_bytes((folder / "a.safetensors").read_bytes()[:size])
    assert "its header is cut short" in refused(stored_tensors, folder)


def test_bytes_that_are_not_those_of_the_shape(folder: Path):
    header = header_of(folder / "a.safetensors")
    header["a"]["shape"] = [4, 2]
    with_header(folder / "a.safetensors", json.dumps(header).encode())
    assert "a has 48 bytes instead of 32" in refused(stored_tensors, folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"weights": {}}', '{"weight_map": 3}'])
def test_an_index_that_is_none(folder: Path, text: str):
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json is damaged" in refused(stored_tensors, folder)


def test_tensors_and_files_that_the_index_has_alone(folder: Path):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["c"] = "b.safetensors"
    path.write_text(json.dumps(index))
    assert "lacks 1 tensors that" in refused(stored_tensors, folder)
    (folder / "b.safetensors").unlink()
    assert "lacks 1 of its 2 files: b.safetensors" in refused(stored_tensors, folder)


def test_a_file_that_is_cut_while_it_is_read(folder: Path):
    """The headers were checked an hour ago: zeros must not take the place of what is not there any more."""
    stored = stored_tensors(folder)["a"]
    path = folder / "a.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    assert "a ends after 44 of 48 bytes" in refused(stored.read, "a")


def test_a_config_is_an_object(tmp_path: Path):
    (tmp_path / "config.json").write_text("[]")
    assert "config.json holds a list" in refused(read_config, tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff")
    assert "config.json cannot be read" in refused(read_config, tmp_path)


def test_whose_config_it_is(tmp_path: Path):
    """Ours has an architecture and no type of model; a file of theirs may have a field of any name, or no type."""
    path = tmp_path / "config.json"
    path.write_text('{"architecture": {}, "format": 1}')
    assert "is a run of linear_moe" in refused(describe_folder, tmp_path)
    path.write_text('{"architecture": "x", "model_type": "bert"}')
    assert "describes a model of type 'bert'" in refused(describe_folder, tmp_path)
    path.write_text('{"hidden_size": 64}')
    assert "describes a model of type None" in refused(describe_folder, tmp_path)


@pytest.mark.parametrize("text", [None, "{", '{"arguments": []}', "[]"])
def test_a_folder_of_ours_without_its_arguments(tmp_path: Path, text: str | None):
    (tmp_path / "config.json").write_text('{"model_type": "linear_moe"}')
    if text is not None:
        (tmp_path / "linear_moe_run.json").write_text(text)
    assert "has no linear_moe_run.json that can be read" in refused(describe_folder, tmp_path)


ARGUMENTS = {
    **{"num-layers": 2, "hidden-size": 64, "ffn-hidden-size": 96, "num-attention-heads": 4},
    **{"kv-channels": 16, "rotary-base": 10000, "norm-epsilon": 1e-6, "max-position-embeddings": 64},
}


@pytest.mark.parametrize(
    ("family", "absent", "config", "told"),
    [
        ("qwen2", "", {"vocab_size": 250}, ""),
        ("qwen9", "", {"vocab_size": 250}, "has no linear_moe_run.json that can be read: KeyError: 'qwen9'"),
        ("qwen2", "rotary-base", {"vocab_size": 250}, "linear_moe_run.json lacks sizes of the model"),
        ("qwen2", "", {}, "config.json lacks vocab_size"),
        ("qwen2", "", {"vocab_size": "250"}, "config.json lacks vocab_size"),
    ],
)
def test_a_folder_of_ours_of_another_version(
    tmp_path: Path, family: str, absent: str, config: dict[str, Any], told: str
):
    words = [str(word) for name, n in ARGUMENTS.items() if name != absent for word in (f"--{name}", n)]
    run = {"architecture": {"family": family, "layer_kinds": ["gla", "softmax"]}, "arguments": words}
    (tmp_path / "linear_moe_run.json").write_text(json.dumps(run))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "linear_moe"} | config))
    if told:
        assert told in refused(describe_folder, tmp_path)
    else:
        described = describe_folder(tmp_path)
        assert (described.size.vocab_size, described.kinds) == (250, ("gla", "softmax"))


def test_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What an unfinished folder holds already counts; a folder to be made counts as its parents' disk."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 3 * 10**9))
    target = tmp_path / "not yet" / "target"
    folders.check_room(target, 3 * 10**9)
    text = refused(folders.check_room, target, 3 * 10**9 + 1000)
    assert text.startswith(f"{tmp_path} has 3.0 GB free, target needs 3.0 GB\n")
    part = folders.part_of(target) / "inside"
    part.mkdir(parents=True)
    (part / "file").write_bytes(bytes(1000))
    folders.check_room(target, 3 * 10**9 + 1000)
    refused(folders.check_room, target, 3 * 10**9 + 1001)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != target.parent)
    assert refused(folders.check_room, target, 1).startswith(f"cannot write to {target.parent}\n")


def test_an_unfinished_folder_of_another_task_is_not_kept(tmp_path: Path):
    target = tmp_path / "target"
    part = folders.begin(target, {"source": "a", "shard": 1})
    (part / "file").write_text("of a")
    assert (folders.begin(target, {"shard": 1, "source": "a"}) / "file").exists(), "the same task"
    assert not (folders.begin(target, {"source": "b", "shard": 1}) / "file").exists()
    (part / "file").write_text("of b")
    target.mkdir()
    folders.refuse_existing(target)  # it is empty
    folders.finish(part, target)
    assert [path.name for path in target.iterdir()] == ["file"] and not part.exists()
    (tmp_path / "a file").touch()
    assert "a file exists" in refused(folders.refuse_existing, tmp_path / "a file")
    (tmp_path / "c.part").mkdir()
    folders.refuse_existing(tmp_path / "c")  # stopped before it was said what it will be
    (tmp_path / "b.part").touch()
    assert "b.part exists, and no conversion has left it" in refused(folders.refuse_existing, tmp_path / "b")


def test_another_state_of_a_file_is_another_task(tmp_path: Path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1234")
    b.write_text("1234")
    before = folders.fingerprint([a, b])
    assert folders.fingerprint([b, a, a]) == before != folders.fingerprint([a])
    b.write_text("12345")
    assert folders.fingerprint([a, b]) != before


@pytest.mark.parametrize("inside", ["", "checkpoint", "checkpoint/iter_0000007", "checkpoint/iter_0000012"])
def test_a_run_or_what_is_in_it(tmp_path: Path, inside: str):
    """A folder of one iteration is that one, whichever is the latest."""
    for step in (7, 12):
        (tmp_path / "checkpoint" / f"iter_{step:07d}").mkdir(parents=True)
        (tmp_path / "checkpoint" / f"iter_{step:07d}" / ".metadata").touch()
        (tmp_path / "checkpoint" / f"iter_{step:07d}" / "metadata.json").write_text(
            '{"sharded_backend": "torch_dist"}'
        )
    (tmp_path / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("12")
    (tmp_path / "config.json").write_text("{}")
    step = 7 if inside.endswith("7") else 12
    found = folders.run_and_iteration(tmp_path / inside)
    assert found == (tmp_path, tmp_path / "checkpoint" / f"iter_{step:07d}", step)
    if "iter_" in inside:
        assert folders.run_and_iteration(tmp_path / inside, step) == found
        other = refused(folders.run_and_iteration, tmp_path / inside, 19 - step)
        assert f"is step {step}, and step {19 - step} is asked for" in other


def test_no_program_in_a_pickle_runs(tmp_path):
    class Program:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "it ran",)

    torch.save({"a": Program()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin cannot be read: [^\n]+\n  why: .*could run code\n"
    ):
        stored_tensors(tmp_path, allow_pickle=True)
    assert not (tmp_path / "it ran").exists()


def test_pickles_in_several_files(tmp_path):
    """As large models of that time have them: the index says which; a tensor is read from its own."""
    first, second = {"a": torch.arange(6.0).view(2, 3)}, {"b": torch.ones(4, dtype=torch.bfloat16)}
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for name, tensors in zip(files, (first, second), strict=True):
        torch.save(tensors, tmp_path / name)
    index = {"weight_map": dict(zip("ab", files, strict=True))}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    stored = stored_tensors(tmp_path, allow_pickle=True)
    assert {key: entry.path.name for key, entry in stored.items()} == index["weight_map"]
    for key, tensor in (first | second).items():
        assert stored[key].shape == tensor.shape and stored[key].dtype == tensor.dtype
        assert torch.equal(stored[key].read(key), tensor)
    with pytest.raises(ValueError, match=r"holds its weights in pickles only"):
        stored_tensors(tmp_path)
    (tmp_path / files[1]).unlink()
    with pytest.raises(ValueError, match=rf"{files[1]} cannot be read: .*\n  why: it is missing"):
        stored_tensors(tmp_path, allow_pickle=True)

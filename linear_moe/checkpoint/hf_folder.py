"""A Hugging Face model folder, read and written one tensor at a time: nothing larger than a tensor is ever held.

The safetensors format is a length (8 bytes), a JSON header, the bytes of all tensors. The library maps whole files and
collects whole shards to save them; a converter that must hold one tensor reads and writes the bytes itself.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"
PICKLES = ("pytorch_model.bin.index.json", "pytorch_model.bin")
SHARD_BYTES = 5_000_000_000
"""Largest shard that export writes, as transformers does."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Stored:
    """Where a tensor is."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Of its bytes in the file; unused for pickles."""
    first: int = 0
    """First row, of a part of a tensor."""
    pickled: str | None = None
    """The tensor's name in a pickle."""

    @property
    def size(self) -> int:
        """In bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own."""
        if self.pickled is not None:
            tensors = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
            tensor: Tensor = tensors[self.pickled]
            return tensor[self.first : self.first + self.shape[0]].clone()
        data = torch.empty(self.size, dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            view, done = memoryview(data.numpy()), 0
            while done < self.size:
                count = file.readinto(view[done:])
                if not count:
                    raise ValueError(_damaged(self.path, f"{name} ends after {done} of {self.size} bytes"))
                done += count
        return data.view(self.dtype).reshape(self.shape)


def stored_tensors(folder: Path, *, allow_pickle: bool = False) -> dict[str, Stored]:
    """Every tensor of a model folder, by name; headers are read and checked, no tensor is.

    Raises:
        ValueError: no weights, files of the index that are missing or cut short, dtypes we do not know, only pickles.
    """
    if (folder / ONE_FILE).is_file():  # beside an index, too: as transformers reads it
        names, files = None, [ONE_FILE]
    elif (folder / INDEX).is_file():
        names = _weight_map(folder / INDEX)
        files = sorted(set(names.values()))
        absent = [name for name in files if not (folder / name).is_file()]
        if absent:
            raise ValueError(
                f"{folder} lacks {len(absent)} of its {len(files)} files: {', '.join(absent[:4])}\n"
                f"  why: {INDEX} names them\n"
                f"  try: download or copy the folder again"
            )
    else:
        return _pickled_tensors(folder, allow_pickle)
    found: dict[str, Stored] = {}
    for name in files:
        found |= _safetensors_header(folder / name)
    if names is not None and (lost := sorted(set(names) - set(found))):
        raise ValueError(
            f"{folder} lacks {len(lost)} tensors that {INDEX} lists: {', '.join(lost[:4])}\n"
            f"  why: no file holds them\n"
            f"  try: download or copy the folder again"
        )
    return found


def _weight_map(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(_damaged(path, f"{type(error).__name__}: {error}")) from None


def _safetensors_header(path: Path) -> dict[str, Stored]:
    """Where the tensors of one file are."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else _MAX_HEADER
        if length >= _MAX_HEADER or 8 + length > size:
            raise ValueError(_damaged(path, "its header is cut short"))
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(_damaged(path, f"its header is no JSON ({error})")) from None
    try:
        return _described_tensors(path, header, 8 + length, size)
    except (AttributeError, KeyError, TypeError) as error:
        what = f"its header does not describe tensors ({type(error).__name__}: {error})"
        raise ValueError(_damaged(path, what)) from None


def _described_tensors(path: Path, header: dict[str, Any], first: int, size: int) -> dict[str, Stored]:
    """From the header of a file of so many bytes, of which those of tensors start at ``first``."""
    header.pop("__metadata__", None)
    unknown = {entry["dtype"] for entry in header.values()} - set(DTYPES)
    if unknown:
        some = next(name for name, entry in header.items() if entry["dtype"] in unknown)
        raise ValueError(
            f"{path} holds tensors of type {', '.join(sorted(unknown))} ({some})\n"
            f"  why: weights are F64, F32, F16 or BF16 here; quantised ones would have to be unpacked first\n"
            f"  try: the original, unquantised model"
        )
    end = first + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise ValueError(_damaged(path, f"it has {size} bytes, its header describes {end}"))
    found = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        stored = Stored(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), first + start)
        if stored.size != stop - start:
            raise ValueError(_damaged(path, f"{name} has {stop - start} bytes instead of {stored.size}"))
        found[name] = stored
    return found


def _pickled_tensors(folder: Path, allow_pickle: bool) -> dict[str, Stored]:
    if not any((folder / name).is_file() for name in PICKLES):
        raise ValueError(
            f"{folder} holds no weights\n"
            f"  why: there is neither {ONE_FILE} nor {INDEX}\n"
            f"  try: the folder that save_pretrained() or the hub made, whole"
        )
    if not allow_pickle:
        raise ValueError(
            f"{folder} holds its weights in pickles only (pytorch_model.bin)\n"
            f"  why: a pickle can run code when it is opened, and such files are slow to read in parts\n"
            f"  try: a copy with safetensors, or --allow-pickle (tensors only; other contents are refused)"
        )
    index = folder / PICKLES[0]
    files = sorted(set(_weight_map(index).values())) if index.is_file() else [PICKLES[1]]
    found = {}
    for name in files:
        for key, tensor in _unpickled(folder / name).items():
            found[key] = Stored(folder / name, tensor.dtype, tuple(tensor.shape), 0, pickled=key)
    return found


def _unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, none of which is in memory yet."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        assert all(isinstance(tensor, Tensor) for tensor in tensors.values()), "it holds more than tensors"
    except Exception as error:  # of files, zip and pickle: by what is wrong
        raise ValueError(
            f"{path} cannot be read: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}\n"
            f"  why: it is missing, damaged, older than torch 1.6, or holds more than tensors, which could run code\n"
            f"  try: a copy with safetensors, or download it again"
        ) from error
    return dict(tensors)


def _damaged(path: Path, what: str) -> str:
    return (
        f"{path} is damaged: {what}\n"
        f"  why: a download or copy that stopped half way, or a full disk\n"
        f"  try: download or copy it again"
    )


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def shards(tensors: Mapping[str, Planned], shard_bytes: int = SHARD_BYTES) -> dict[str, list[str]]:
    """File name of each shard and the tensors in it, in their order."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, planned in tensors.items():
        if groups[-1] and filled + planned.size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += planned.size
    if len(groups) == 1:
        return {ONE_FILE: groups[0]}
    count = len(groups)
    return {f"model-{i + 1:05d}-of-{count:05d}.safetensors": group for i, group in enumerate(groups)}


def write_shard(
    path: Path, names: list[str], tensors: Mapping[str, Planned], read: Callable[[str], Tensor]
) -> Iterator[str]:
    """Write one safetensors file; yields each name once its tensor is in it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        planned = tensors[name]
        header[name] = {
            "dtype": NAMES[planned.dtype],
            "shape": list(planned.shape),
            "data_offsets": [offset, offset + planned.size],
        }
        offset += planned.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    part = path.with_name(path.name + ".part")
    with open(part, "wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            tensor, planned = read(name), tensors[name]
            assert tensor.dtype == planned.dtype and tuple(tensor.shape) == planned.shape, (name, planned)
            data = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
            while data:  # one write takes 2 GB at most
                data = data[file.write(data) :]
            yield name
    part.replace(path)


def write_index(folder: Path, files: Mapping[str, list[str]], tensors: Mapping[str, Planned]) -> None:
    """The index of several shards; nothing for a single file."""
    if len(files) == 1:
        return
    total = sum(planned.size for planned in tensors.values())
    names = {name: file for file, group in files.items() for name in group}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

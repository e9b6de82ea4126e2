"""Megatron's ``torch_dist`` checkpoints, read by region and written tensor by tensor, in one process.

    iter_0000001/metadata.json     which format it is
    iter_0000001/.metadata         every tensor's shape and pieces, and where each piece is (torch's Metadata)
    iter_0000001/__0_7.distcp      pieces, each as torch.save wrote it, one behind the other

Megatron's own saving wants all tensors of a rank in memory. Here a piece is made when its turn comes; what is written
is what torch.distributed.checkpoint writes, so that its readers, and with them Megatron under any layout, open it.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

FILE_BYTES = 2_000_000_000
"""Most bytes of one file, unless a single piece is larger; an interrupted conversion loses one file."""


@dataclass(frozen=True)
class Piece:
    """A rectangle of a checkpoint's tensor, and how to make it."""

    key: str
    whole_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """In bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write(folder: Path, pieces: Sequence[Piece], objects: dict[str, object]) -> Iterator[int]:
    """Write a checkpoint; yields the bytes of each piece when it is done. Goes on where an earlier call stopped.

    Args:
        folder: may hold the complete files of an interrupted call with the same pieces.
        pieces: they must cover every tensor exactly.
        objects: what is not a tensor, by Megatron's unique key.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[MetadataIndex, _StorageInfo] = {}
    for number, group in enumerate(_files(pieces)):
        name = f"__0_{number}.distcp"
        done = folder / f"{name}.json"  # offsets and lengths: the file is complete
        if not done.is_file():
            where = yield from _write_file(folder / name, group)
            half = done.with_suffix(".part")
            half.write_text(json.dumps(where))
            half.replace(done)  # there or not, whenever we are stopped
        else:
            where = json.loads(done.read_text())
            yield sum(piece.size for piece in group)
        for piece, (offset, length) in zip(group, where, strict=True):
            index = MetadataIndex(piece.key, torch.Size(piece.offset))
            places[index] = _StorageInfo(name, offset, length)
    places |= _write_objects(folder / "__0_objects.distcp", objects)
    metadata = Metadata(_tensors(pieces) | dict.fromkeys(objects, BytesStorageMetadata()), {}, places)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    for path in folder.glob("*.distcp.json"):
        path.unlink()


def _files(pieces: Sequence[Piece]) -> list[list[Piece]]:
    files: list[list[Piece]] = [[]]
    for piece in pieces:
        if files[-1] and sum(p.size for p in files[-1]) + piece.size > FILE_BYTES:
            files.append([])
        files[-1].append(piece)
    return files


def _write_file(path: Path, group: list[Piece]) -> Generator[int, None, list[tuple[int, int]]]:
    where = []
    with open(path, "wb") as file:
        for piece in group:
            offset = file.tell()
            tensor = piece.make()
            assert tensor.dtype == piece.dtype and tuple(tensor.shape) == piece.shape, piece
            torch.save(tensor if tensor.is_contiguous() else tensor.contiguous(), file)
            where.append((offset, file.tell() - offset))
            del tensor
            yield piece.size
    return where


def _write_objects(path: Path, objects: dict[str, object]) -> dict[MetadataIndex, _StorageInfo]:
    places = {}
    with open(path, "wb") as file:
        for key, value in objects.items():
            offset, stream = file.tell(), io.BytesIO()
            torch.save([value], stream)  # Megatron's form: a list with the objects of the key
            file.write(stream.getbuffer())
            places[MetadataIndex(key)] = _StorageInfo(path.name, offset, file.tell() - offset)
    return places


def _tensors(pieces: Sequence[Piece]) -> dict[str, TensorStorageMetadata | BytesStorageMetadata]:
    found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for piece in pieces:
        chunk = ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.shape))
        known = found.get(piece.key)
        if isinstance(known, TensorStorageMetadata):
            assert known.size == torch.Size(piece.whole_shape) and known.properties.dtype == piece.dtype
            known.chunks.append(chunk)
        else:
            properties = TensorProperties(dtype=piece.dtype)
            found[piece.key] = TensorStorageMetadata(properties, torch.Size(piece.whole_shape), [chunk])
    return found


class _Slice(io.RawIOBase):
    """A part of a file as a file: torch reads the tensor in it without another copy."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self.file, self.start, self.length, self.place = file, start, length, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of any file."""
        self.place = offset + {0: 0, 1: self.place, 2: self.length}[whence]
        return self.place

    def tell(self) -> int:
        """As of any file."""
        return self.place

    def readinto(self, buffer: Any) -> int:
        """As of any file."""
        self.file.seek(self.start + self.place)
        view = memoryview(buffer).cast("B")[: max(self.length - self.place, 0)]
        count: int = self.file.readinto(view)  # type: ignore[attr-defined]
        self.place += count
        return count


class Reader:
    """The weights of a checkpoint, saved under any layout.

    Args:
        folder: one iteration of it.

    Raises:
        ValueError: no such checkpoint, or its description is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.metadata = FileSystemReader(folder).read_metadata()
        except Exception as error:  # of files and pickle: by what is wrong
            raise ValueError(
                f"{folder} cannot be read as a torch_dist checkpoint: {type(error).__name__}: {error}\n"
                f"  why: its .metadata is missing or damaged (an interrupted save or copy)\n"
                f"  try: another iteration of the run"
            ) from error
        tensors = self.metadata.state_dict_metadata.items()
        self.kept: tuple[str, dict[tuple[int, ...], Tensor]] = ("", {})
        self.tensors = {key: entry for key, entry in tensors if isinstance(entry, TensorStorageMetadata)}

    def check_whole(self, keys: Iterable[str]) -> None:
        """``ValueError`` where a piece of these tensors is missing, or its file, or the end of that; none is read."""
        ends: dict[str, int] = {}
        for key in keys:
            entry = self.tensors[key]
            held = sum(chunk.sizes.numel() for chunk in entry.chunks)
            if held != entry.size.numel():
                what = f"its pieces of {key} hold {held} of {entry.size.numel()} numbers"
                raise ValueError(_unreadable(self.folder / ".metadata", what))
            for chunk in entry.chunks:
                place = self.metadata.storage_data[MetadataIndex(key, chunk.offsets)]
                ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for name, end in ends.items():
            path = self.folder / name
            size = path.stat().st_size if path.is_file() else 0
            if size < end:
                raise ValueError(_unreadable(path, f"it has {size} bytes, .metadata describes {end}"))

    def read(self, key: str, first: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``first`` to ``stop`` of a tensor; pieces that lie elsewhere are not read.

        A piece with more rows than these (all experts of a layer) is kept until another key is read.

        Raises:
            ValueError: a file is missing or cut short.
        """
        entry = self.tensors[key]
        stop = entry.size[0] if stop is None else stop
        out = torch.empty((stop - first, *entry.size[1:]), dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            low, high = max(first, chunk.offsets[0]), min(stop, chunk.offsets[0] + chunk.sizes[0])
            if low >= high:
                continue
            piece = self._piece(key, chunk, keep=high - low < chunk.sizes[0])
            data = piece[low - chunk.offsets[0] : high - chunk.offsets[0]]
            rest = [slice(o, o + n) for o, n in zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)]
            out[(slice(low - first, high - first), *rest)] = data
        return out

    def _piece(self, key: str, chunk: ChunkStorageMetadata, keep: bool) -> Tensor:
        if self.kept[0] != key:
            self.kept = (key, {})
        offset = tuple(chunk.offsets)
        if offset in self.kept[1]:
            return self.kept[1][offset]
        tensor = self._read_piece(key, chunk)
        if keep:
            self.kept[1][offset] = tensor
        return tensor

    def _read_piece(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        place = self.metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        path = self.folder / place.relative_path
        try:
            with open(path, "rb") as file:
                part = _Slice(file, place.offset, place.length)
                tensor: Tensor = torch.load(part, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
        except Exception as error:
            what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise ValueError(_unreadable(path, what)) from error
        assert tensor.shape == chunk.sizes, (key, tensor.shape, chunk)
        return tensor


def _unreadable(path: Path, what: str) -> str:
    return (
        f"{path} cannot be read: {what}\n"
        f"  why: it is missing, cut short or changed (a full disk, an interrupted copy)\n"
        f"  try: another iteration of the run"
    )

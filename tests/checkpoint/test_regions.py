"""Regions of a torch_dist checkpoint, saved in pieces of any shape, against the whole tensors; and what is damaged."""

import io
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

TENSORS = {
    "a": torch.arange(60.0).view(6, 10),
    "experts": torch.arange(48.0).view(4, 3, 4).to(torch.bfloat16),
}
PIECES = {
    "a": [((0, 0), (2, 10)), ((2, 0), (3, 4)), ((2, 4), (3, 6)), ((5, 0), (1, 10))],
    "experts": [((0, 0, 0), (2, 3, 4)), ((2, 0, 0), (2, 2, 4)), ((2, 2, 0), (2, 1, 4))],
}
"""Offset and shape: cut by rows, by columns, and by both."""


def part(tensor: torch.Tensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    return tensor[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]


def made(folder: Path) -> list[int]:
    """Write them, in files of a few pieces; the bytes of each that are reported."""
    from linear_moe.checkpoint import torch_dist

    pieces = [
        torch_dist.Piece(
            key, tuple(TENSORS[key].shape), offset, shape, TENSORS[key].dtype,
            lambda key=key, offset=offset, shape=shape: part(TENSORS[key], offset, shape),
        )
        for key, cuts in PIECES.items()
        for offset, shape in cuts
    ]  # fmt: skip
    with patch.object(torch_dist, "FILE_BYTES", 130):
        groups = [[piece.size for piece in group] for group in torch_dist._files(pieces)]
        assert groups == [[80, 48], [72, 40], [48, 32, 16]], "each as full as it may be"
        return list(torch_dist.write(folder, pieces, {"an object": {"x": 1}}))


def regions(rank: int, world: int, root: str) -> dict[str, Any]:
    from torch.distributed.checkpoint import FileSystemReader, load

    from linear_moe.checkpoint.torch_dist import Reader

    folder = Path(root) / "iter_0000001"
    found: dict[str, Any] = {
        "reported": made(folder),
        "files": sorted(path.name for path in folder.iterdir()),
    }
    theirs = {key: torch.zeros_like(tensor) for key, tensor in TENSORS.items()}
    load(theirs, storage_reader=FileSystemReader(folder), no_dist=True)
    found["theirs"] = all(torch.equal(theirs[key], tensor) for key, tensor in TENSORS.items())
    reader, reads = Reader(folder), []
    read = reader._read_piece

    def counted(key: str, chunk: Any) -> torch.Tensor:
        reads.append((key, tuple(chunk.offsets)))
        return read(key, chunk)

    reader._read_piece = counted  # type: ignore[method-assign]
    found["wrong"] = []
    for key, tensor in TENSORS.items():
        for first in range(len(tensor)):
            for stop in (*range(first + 1, len(tensor) + 1), None):
                again = reader.read(key, first, stop)
                if again.dtype != tensor.dtype or not torch.equal(again, tensor[first:stop]):
                    found["wrong"].append((key, first, stop))
    reads.clear()
    reader = Reader(folder)
    reader._read_piece = counted  # type: ignore[method-assign]
    for row in range(4):
        reader.read("experts", row, row + 1)
    found["reads"] = list(reads)
    reader.read("a", 5)
    found["kept"] = reader.kept[0], list(reader.kept[1])
    (folder / "__0_1.distcp").write_bytes((folder / "__0_1.distcp").read_bytes()[:100])
    found["first"] = torch.equal(Reader(folder).read("a", 0, 2), TENSORS["a"][:2])
    (folder / "__0_2.distcp").unlink()
    found["told"] = []
    for key in TENSORS:
        try:
            Reader(folder).read(key)
        except ValueError as error:
            found["told"].append(str(error))
    return found


def checked(rank: int, world: int, root: str) -> list[list[str]]:
    """What is told of tensors whose pieces, or their files, are not whole; by damage and tensor."""
    from linear_moe.checkpoint.torch_dist import Reader

    folder = Path(root) / "iter_0000001"
    made(folder)

    def told() -> list[str]:
        texts = []
        for key in TENSORS:
            try:
                Reader(folder).check_whole([key])
                texts.append("whole")
            except ValueError as error:
                texts.append(str(error))
        return texts

    found = [told()]
    data = (folder / "__0_1.distcp").read_bytes()
    (folder / "__0_1.distcp").write_bytes(data[:-1])
    found.append(told())
    (folder / "__0_1.distcp").write_bytes(data)
    (folder / "__0_0.distcp").unlink()
    found.append(told())
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.state_dict_metadata["experts"].chunks.pop()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return [*found, told()]


def test_what_is_not_whole_is_told_before_anything_is_read(gloo, tmp_path):
    """Pieces of "a" are in the files 0 and 1, those of the experts in file 2."""
    whole, cut, lost, pieces = gloo(1, checked, str(tmp_path))[0]
    assert whole == ["whole", "whole"]
    assert "__0_1.distcp cannot be read: it has " in cut[0] and cut[1] == "whole"
    assert "__0_0.distcp cannot be read: it has 0 bytes" in lost[0] and lost[1] == "whole"
    assert ".metadata cannot be read: its pieces of experts hold 40 of 48 numbers\n  why: " in pieces[1]


def stopped_while_saying_what_is_complete(rank: int, world: int, root: str) -> bool:
    """A conversion that is ended in the middle of the note on its first file, and then once more."""
    from linear_moe.checkpoint.torch_dist import Reader

    write = Path.write_text

    def stop(path: Path, text: str) -> None:
        write(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    folder = Path(root) / "iter_0000001"
    with patch.object(Path, "write_text", stop), suppress(KeyboardInterrupt):
        made(folder)
    assert not (folder / ".metadata").exists()
    made(folder)
    left = [path.name for path in folder.iterdir() if path.suffix not in (".distcp", ".json", "")]
    return not left and all(torch.equal(Reader(folder).read(key), tensor) for key, tensor in TENSORS.items())


def test_a_note_on_a_complete_file_is_whole_or_not_there(gloo, tmp_path):
    assert gloo(1, stopped_while_saying_what_is_complete, str(tmp_path))[0]


def with_code(rank: int, world: int, root: str) -> str:
    """A piece of a checkpoint that is no tensor, but a program."""
    from linear_moe.checkpoint import torch_dist

    class Program:
        def __reduce__(self) -> Any:
            return Path.touch, (Path(root) / "it ran",)

    folder = Path(root) / "iter_0000001"
    piece = torch_dist.Piece("a", (1,), (0,), (1,), torch.float32, lambda: torch.ones(1))
    with patch.object(torch_dist.torch, "save", lambda tensor, file: file.write(pickle.dumps(Program()))):
        list(torch_dist.write(folder, [piece], {}))
    try:
        torch_dist.Reader(folder).read("a")
    except ValueError as error:
        return str(error)
    return ""


def test_no_program_in_a_checkpoint_runs(gloo, tmp_path):
    assert "__0_0.distcp cannot be read" in gloo(1, with_code, str(tmp_path))[0]
    assert not (tmp_path / "it ran").exists()


def slices(rank: int, world: int, root: str) -> list[Any]:
    """What a part of a file and a file of that part give to the same calls."""
    from linear_moe.checkpoint.torch_dist import _Slice

    path, found = Path(root) / "file", []
    path.write_bytes(bytes(range(100)))
    with open(path, "rb") as file:
        for stream in (_Slice(file, 30, 20), io.BytesIO(bytes(range(30, 50)))):
            calls: list[Any] = [stream.readable(), stream.seekable(), stream.tell(), stream.read(4)]
            calls += [stream.seek(-3, 2), stream.read(9), stream.tell(), stream.read(1), stream.seek(5)]
            calls += [stream.seek(2, 1), stream.read(2), stream.seek(25), stream.read(1)]
            found.append(calls)
    return found


def test_a_part_of_a_file_is_a_file(gloo, tmp_path):
    part, alone = gloo(1, slices, str(tmp_path))[0]
    assert part == alone


def test_regions_are_those_of_the_whole(gloo, tmp_path):
    found = gloo(1, regions, str(tmp_path))[0]
    assert found["wrong"] == [] and found["theirs"]
    assert found["reported"] == [80, 48, 72, 40, 48, 32, 16]
    names = [*(f"__0_{i}.distcp" for i in range(3)), "__0_objects.distcp"]
    assert [name for name in found["files"] if name.startswith("__0")] == names, (
        "nothing is left of the writing"
    )
    assert found["reads"] == [("experts", (0, 0, 0)), ("experts", (2, 0, 0)), ("experts", (2, 2, 0))], (
        "a piece with rows to come is kept, and none is read for rows that it has not"
    )
    assert found["kept"] == ("a", []), "until another tensor is read"
    assert found["first"] and [text.split(" cannot be read")[0][-12:] for text in found["told"]] == [
        "__0_1.distcp",
        "__0_2.distcp",
    ]
    assert all("\n  why: it is missing, cut short or changed" in text for text in found["told"])

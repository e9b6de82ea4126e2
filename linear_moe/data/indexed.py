"""Megatron's indexed token files, read without Megatron: `PREFIX.idx` says where each document of `PREFIX.bin` lies.

    PREFIX.idx   magic, version, dtype code, number of sequences S and of document ends D, lengths int32 [S],
                 byte offsets int64 [S], document ends int64 [D]
    PREFIX.bin   the tokens, one document after another
    PREFIX.json  our manifest: what wrote the files, and the tokenizer's vocabulary and end-of-document token

The reader exists so that the launcher can check data in milliseconds; training reads the same files through Megatron.
"""

import json
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document ends
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}


class CorruptDataError(ValueError):
    """A `.bin`/`.idx` pair that cannot be what its writer meant; the text says which file and how."""


@dataclass(frozen=True)
class IndexInfo:
    """Header of a pair of token files, checked against both files' sizes."""

    dtype: str
    """numpy name of the token type: uint16 for vocabularies below 65500, else int32."""
    num_documents: int
    """Documents."""
    num_tokens: int
    """Tokens of all documents, end-of-document tokens included."""


@dataclass(frozen=True)
class Manifest:
    """What `tools/preprocess_data.py` writes beside the token files, so that a run can check that all fit together."""

    tokenizer: str
    """Path of the tokenizer at the time."""
    tokenizer_fingerprint: str
    """Hash of its vocabulary and merges: a copy elsewhere has the same one."""
    vocab_size: int
    """One more than the largest token id of the tokenizer."""
    eod: int
    """Token at the end of every document."""
    num_tokens: int
    """Tokens of all documents."""
    num_documents: int
    """Documents."""
    source: list[str]
    """Input files."""


def read_index(prefix: str) -> IndexInfo:
    """Header of `PREFIX.idx`, checked against the sizes of `.idx` and `.bin`.

    Raises FileNotFoundError when a file is missing, CorruptDataError when the two cannot belong together.
    """
    idx, bin_ = Path(prefix + ".idx"), Path(prefix + ".bin")
    bin_bytes = bin_.stat().st_size
    with idx.open("rb") as stream:
        head = stream.read(_HEADER.size)
        if len(head) < _HEADER.size or not head.startswith(_MAGIC):
            raise CorruptDataError(
                f"{idx} is not a Megatron index: it does not start with {_MAGIC[:7].decode()}"
            )
        _, version, code, sequences, ends = _HEADER.unpack(head)
        if version != 1 or code not in _DTYPES:
            raise CorruptDataError(
                f"{idx} has version {version} and token type {code}, unknown to Megatron-Core 0.19"
            )
        needed = _HEADER.size + 12 * sequences + 8 * ends
        if idx.stat().st_size < needed:
            raise CorruptDataError(f"{idx} is cut off: {idx.stat().st_size} bytes of {needed}")
        lengths = np.fromfile(stream, np.int32, sequences)
    dtype = np.dtype(_DTYPES[code])
    num_tokens = int(lengths.sum(dtype=np.int64))
    if bin_bytes != num_tokens * dtype.itemsize:
        raise CorruptDataError(
            f"{bin_} has {bin_bytes} bytes, but {idx.name} describes {num_tokens * dtype.itemsize} "
            f"({num_tokens} tokens of {dtype.name})"
        )
    return IndexInfo(dtype.name, ends - 1, num_tokens)


def read_tokens(prefix: str, limit: int | None = None) -> np.ndarray:
    """The first `limit` tokens (None: all of them) of a pair of token files, memory-mapped: [tokens]."""
    info = read_index(prefix)
    count = info.num_tokens if limit is None else min(limit, info.num_tokens)
    if count == 0:
        return np.empty(0, info.dtype)
    return np.memmap(prefix + ".bin", dtype=info.dtype, mode="r", shape=(count,))


def unigram_entropy(prefix: str, limit: int | None = None) -> float:
    """Entropy of the token frequencies, in nats per token: the loss of the best model that ignores all context."""
    counts = np.bincount(read_tokens(prefix, limit)).astype(np.float64)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def read_manifest(prefix: str) -> Manifest | None:
    """The manifest beside the token files; None when another tool wrote them. CorruptDataError when it is broken."""
    path = Path(prefix + ".json")
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        return Manifest(**values)
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, TypeError, UnicodeDecodeError) as error:
        raise CorruptDataError(f"{path} is not a manifest of tools/preprocess_data.py ({error})") from None


def manifest_text(manifest: Manifest) -> str:
    """The manifest as it is stored."""
    return json.dumps(asdict(manifest), indent=1) + "\n"

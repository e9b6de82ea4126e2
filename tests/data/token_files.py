"""Small tokenizers and token files for tests."""

from pathlib import Path

import numpy as np

from linear_moe.data.indexed import Manifest, manifest_text
from linear_moe.data.tokenizer import TokenizerInfo, train_tokenizer


def write_tokenizer(folder: Path, vocab_size: int = 300) -> TokenizerInfo:
    """A tokenizer of exactly `vocab_size` tokens."""
    texts = [" ".join(f"{word}{i}" for i in range(200)) for word in ("alpha", "beta", "gamma", "delta")]
    info = train_tokenizer(texts, vocab_size, str(folder))
    assert info.vocab_size == vocab_size
    return info


def write_tokens(prefix: Path, tokens: np.ndarray, tokenizer: TokenizerInfo) -> str:
    """Token files of one document, written byte by byte as Megatron's format says, and a manifest."""
    tokens = tokens.astype("<u2")
    header = (
        b"MMIDIDX\0\0"
        + (1).to_bytes(8, "little")
        + b"\x08"
        + (1).to_bytes(8, "little")
        + (2).to_bytes(8, "little")
    )
    index = (
        np.array([len(tokens)], "<i4").tobytes()
        + np.array([0], "<i8").tobytes()
        + np.array([0, 1], "<i8").tobytes()
    )
    Path(f"{prefix}.idx").write_bytes(header + index)
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    manifest = Manifest(
        tokenizer=tokenizer.path,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        num_tokens=len(tokens),
        num_documents=1,
        source=["made up"],
    )
    Path(f"{prefix}.json").write_text(manifest_text(manifest))
    return str(prefix)

"""Tokens of a sample, with those that are learned marked.

A prompt is tokenized alone when a model is asked, so the tokens of a prompt have to be the same before its answer. They
are in the tokens of the whole text, unless a token reaches over the border; then every piece is tokenized alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np

from linear_moe.data.instructions.template import Rendered


@dataclass(frozen=True)
class Sample:
    """Tokens of one conversation."""

    tokens: np.ndarray
    """``[n]`` int32; the last one is only predicted, never read."""
    learned: np.ndarray
    """``[n]`` bool: the token is in the loss when it is predicted."""

    @property
    def positions(self) -> int:
        """Room that it takes in a sequence: every token is read but the last."""
        return len(self.tokens) - 1

    def cut(self, positions: int) -> "Sample":
        """The beginning."""
        return Sample(self.tokens[: positions + 1], self.learned[: positions + 1])


def tokenize(backend: Any, samples: Sequence[Rendered]) -> list[Sample]:
    """Samples from their texts; ``backend`` is a ``tokenizers.Tokenizer``."""
    whole = _encode(backend, [sample.text for sample in samples])
    pieces = iter(_encode(backend, chain.from_iterable(sample.pieces for sample in samples)))
    return [
        _sample(backend, sample, ids, [next(pieces) for _ in sample.pieces])
        for sample, ids in zip(samples, whole, strict=True)
    ]


def _encode(backend: Any, texts: Iterable[str]) -> list[list[int]]:
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def _sample(backend: Any, sample: Rendered, whole: list[int], pieces: list[list[int]]) -> Sample:
    ids, ends = list(chain.from_iterable(pieces)), list(accumulate(map(len, pieces)))
    if ids != whole:
        # Some tokenizers mark the beginning of a text: pieces alone then differ, and only whole beginnings compare.
        beginnings = _encode(backend, accumulate(sample.pieces))
        if all(whole[: len(beginning)] == beginning for beginning in beginnings):
            ids, ends = whole, [len(beginning) for beginning in beginnings]
    learned = np.zeros(len(ids), dtype=bool)
    for start, end in zip(ends[0::2], ends[1::2], strict=True):
        learned[start:end] = True
    return Sample(np.asarray(ids, dtype=np.int32), learned)

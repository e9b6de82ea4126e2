"""Multi-query associative recall: pairs of a key and a value, then every key again, whose value is to be answered.

    k1 v1 k2 v2 .. kn vn   . . k2 . k1 . . . kn .        what the model reads
                               v2   v1       vn          what it answers, at the query itself; nothing elsewhere

The gap before a query is drawn from a power law, slots without replacement, so most queries come soon after the pairs
and some late. Keys and values are disjoint parts of the vocabulary and neither repeats inside a sequence; what stands
between queries is filler, a third part, so that no key is seen twice before its query.

Letters: N sequences, T tokens, n pairs. Source: arXiv:2312.04927, section 3.2 and appendix E (generation of the data);
there the filler is drawn from the whole vocabulary, which with a vocabulary as small as ours would repeat keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IGNORE = -100
"""Target of every token that is not a query: torch's default for tokens outside the loss."""


@dataclass(frozen=True)
class Task:
    """What is recalled: the numbers of pairs that are mixed, and the room they have."""

    pairs: tuple[int, ...] = (2, 4, 8, 16, 32)
    """Numbers of pairs; a batch holds equally many sequences of each."""
    length: int = 128
    """T, tokens of a sequence."""
    num_keys: int = 64
    """Keys of the vocabulary, and as many values."""
    num_fillers: int = 16
    """Tokens that mean nothing."""
    power: float = 0.01
    """A slot ``g`` after the pairs holds a query with weight ``g ** (power - 1)``."""

    def __post_init__(self) -> None:
        most = max(self.pairs)
        if min(self.pairs) < 1 or most > self.num_keys or 4 * most > self.length:
            raise ValueError(
                f"{most} pairs do not fit {self.length} tokens and {self.num_keys} keys\n"
                f"  why: n pairs take 2 n tokens and their queries as many, and no key is used twice\n"
                f"  try: --length {4 * most} --num-keys {most}, or fewer --pairs"
            )

    @property
    def vocab_size(self) -> int:
        """Keys, then values, then fillers."""
        return 2 * self.num_keys + self.num_fillers


def sequences(
    task: Task, num_pairs: int, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """``count`` sequences of ``num_pairs`` pairs: tokens and targets, both ``[N, T]`` int16."""
    shape = (count, task.length)
    first_filler = 2 * task.num_keys
    tokens_NT = rng.integers(first_filler, first_filler + task.num_fillers, shape, dtype=np.int16)
    targets_NT = np.full(shape, IGNORE, np.int16)
    keys_Nn = _draw(np.zeros(task.num_keys), num_pairs, count, rng)
    values_Nn = _draw(np.zeros(task.num_keys), num_pairs, count, rng) + task.num_keys
    tokens_NT[:, 0 : 2 * num_pairs : 2] = keys_Nn
    tokens_NT[:, 1 : 2 * num_pairs : 2] = values_Nn
    num_slots = (task.length - 2 * num_pairs) // 2
    log_weight = (task.power - 1) * np.log(np.arange(1, num_slots + 1))
    query_at_Nn = 2 * num_pairs + 2 * _draw(log_weight, num_pairs, count, rng)
    np.put_along_axis(tokens_NT, query_at_Nn, keys_Nn, axis=1)
    np.put_along_axis(targets_NT, query_at_Nn, values_Nn, axis=1)
    return tokens_NT, targets_NT


def mixture(task: Task, count: int, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """``count`` sequences of every number of pairs, the numbers taking turns; the same for the same seed.

    Returns:
        Tokens and targets, ``[count * len(pairs), T]`` int16; row ``i`` has ``pairs[i % len(pairs)]`` pairs.
    """
    rng = np.random.default_rng(seed)
    parts = [sequences(task, num_pairs, count, rng) for num_pairs in task.pairs]
    tokens, targets = (np.stack(part, axis=1).reshape(-1, task.length) for part in zip(*parts))
    return tokens, targets


def _draw(log_weight: np.ndarray, size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """``[count, size]`` indices, weighted, none twice in a row: the largest of log weight plus Gumbel noise."""
    noisy = log_weight - np.log(rng.standard_exponential((count, len(log_weight)), dtype=np.float32))
    return np.argsort(-noisy, axis=1)[:, :size].astype(np.int16)

"""Decay inside a chunk: scores between its tokens, and what decays before and after each token.

    scores   A_ij = sum_d q_id k_jd exp(a_{j+1,d} + ... + a_{i,d})       j <= i, a = log_decay

Every exponent is a sum of log decays over a run of tokens, never a difference of two such sums: exponents are never
positive, nothing overflows, strong decays lose no precision to cancellation, and -inf (forget everything) is exact.
With one decay for each token, the [C, C] decays multiply plain scores. With a vector, a chunk is halved again and
again: for a query in a right half and a key in the left half beside it, the run splits at the boundary into a part
that scales the query and a part that scales the key, so each level is one matmul over all pairs of halves.
Sources of the two chunk forms: arXiv:2405.21060 section 6 (scalar), arXiv:2312.06635 section 4.3 (vector, there with
two levels). No code was taken.

Letters: L chunks, B batch, H heads, G query/key heads, C tokens in a chunk, K key dim, V value dim; P pairs of
halves and s tokens in a half, at one level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decays:
    """Factors in (0, 1] around a chunk, ``[L, B, H, C, 1 | K]``, or ``None`` for 1."""

    read: Tensor | None
    """What a memory from before the chunk keeps until token i reads it."""
    write: Tensor | None
    """What the write of token j keeps until the end of the chunk."""
    total: Tensor | None
    """What a memory keeps over the whole chunk, ``[L, B, H, 1 | K]``."""


@dataclass(frozen=True)
class Halves:
    """The decays of every halving of a chunk: level s pairs halves of s tokens."""

    levels: list[tuple[Tensor, Tensor]]
    """``[..., P, s, K]`` each, s = 1, 2, 4, ...: from the boundary to a query, from a key to the boundary."""
    whole: Decays

    @classmethod
    def of(cls, log_decay: Tensor, *, read_first: bool = False) -> Halves:
        """``log_decay`` is ``[..., C, K]``; ``read_first``: a token is read before its own decay."""
        total = log_decay
        suffix = torch.zeros_like(log_decay).unsqueeze(-2)
        prefix = suffix if read_first else log_decay.unsqueeze(-2)
        levels = []
        while total.shape[-2] > 1:
            total_left, total_right = total.unflatten(-2, (-1, 2)).unbind(-2)
            prefix_left, prefix_right = _halves(prefix)
            suffix_left, suffix_right = _halves(suffix)
            levels.append((prefix_right.exp(), suffix_left.exp()))
            prefix = torch.cat([prefix_left, prefix_right + total_left.unsqueeze(-2)], -2)
            suffix = torch.cat([suffix_left + total_right.unsqueeze(-2), suffix_right], -2)
            total = total_left + total_right
        prefix, suffix, total = prefix.squeeze(-3), suffix.squeeze(-3), total.squeeze(-2)
        return cls(levels, Decays(prefix.exp(), suffix.exp(), total.exp()))


def scores(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    log_decay: Tensor | None,
    num_heads: int,
    *,
    read_first: bool = False,
) -> tuple[list[Tensor], Decays]:
    """Decayed scores of several queries against several keys, and the decays around the chunk.

    Args:
        queries: ``[L, B, G, C, K]`` each.
        keys: ``[L, B, G, C, K]`` each.
        log_decay: ``None``, ``[L, B, H, C]`` or ``[L, B, H, C, K]``.
        num_heads: H, a multiple of G.
        read_first: a query reads before its own token decays and writes the memory, so i = j scores 0.

    Returns:
        ``[L, B, H, C, C]`` for each query and key (all keys of the first query first), 0 above the diagonal, and
        the decays.
    """
    if log_decay is not None and log_decay.ndim == keys[0].ndim:
        return _vector_scores(queries, keys, log_decay, num_heads, read_first)
    plain = [repeat_heads(q @ k.mT, num_heads) for q in queries for k in keys]
    if log_decay is None:
        return [a.tril(-1 if read_first else 0) for a in plain], Decays(None, None, None)
    decay, around = _scalar_decays(log_decay, read_first)
    return [a * decay for a in plain], around


def _scalar_decays(log_decay: Tensor, read_first: bool) -> tuple[Tensor, Decays]:
    """``[..., C]`` to ``[..., C, C]``, 0 above the diagonal, and the decays around the chunk."""
    size = log_decay.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=log_decay.device)
    runs = log_decay.unsqueeze(-1).expand(*log_decay.shape, size).masked_fill(~ones.tril(-1), 0.0).cumsum(-2)
    decay = runs.masked_fill(~ones.tril(), float("-inf")).exp()
    read = log_decay.cumsum(-1)
    around = Decays(read.unsqueeze(-1).exp(), decay[..., -1, :].unsqueeze(-1), read[..., -1:].exp())
    if read_first:
        decay = torch.cat([torch.zeros_like(decay[..., :1, :]), decay[..., :-1, :]], -2)
        read = torch.cat([torch.zeros_like(read[..., :1]), read[..., :-1]], -1)
        around = Decays(read.unsqueeze(-1).exp(), around.write, around.total)
    return decay, around


def _vector_scores(
    queries: Sequence[Tensor], keys: Sequence[Tensor], log_decay: Tensor, num_heads: int, read_first: bool
) -> tuple[list[Tensor], Decays]:
    queries = [repeat_heads(q, num_heads) for q in queries]
    keys = [repeat_heads(k, num_heads) for k in keys]
    halves = Halves.of(log_decay, read_first=read_first)
    if read_first:
        blocks = [torch.zeros_like(k[..., :1]).unsqueeze(-1) for _ in queries for k in keys]
    else:
        blocks = [(q * k).sum(-1)[..., None, None] for q in queries for k in keys]
    for level, (read, write) in enumerate(halves.levels):
        reads = [_pairs(q, level)[1] * read for q in queries]
        writes = [(_pairs(k, level)[0] * write).mT for k in keys]
        across = [q @ k for q in reads for k in writes]
        blocks = [merge_blocks(block, a) for block, a in zip(blocks, across)]
    return [block.squeeze(-3) for block in blocks], halves.whole


def mix_values(a: Tensor, v: Tensor, log_decay_v: Tensor) -> tuple[Tensor, Decays]:
    """``o_i = sum_j A_ij exp(log_decay_v over j+1 .. i) * v_j``: a decay of its own for each column of the memory.

    Args:
        a: ``[L, B, H, C, C]``, 0 above the diagonal.
        v: ``[L, B, H, C, V]``.
        log_decay_v: ``[L, B, H, C, V]``.

    Returns:
        ``[L, B, H, C, V]``, and the decays around the chunk with V in the place of K.
    """
    halves = Halves.of(log_decay_v)
    out = a.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * v
    for level, (read, write) in enumerate(halves.levels):
        left, right = _pairs(out, level)
        update = blocks_below(a, level) @ (_pairs(v, level)[0] * write)
        out = torch.stack([left, right + update * read], -3).flatten(-4, -2)
    return out, halves.whole


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """``[L, B, G, ...]`` to ``[L, B, H, ...]``: head h takes group h // (H // G)."""
    groups = x.shape[2]
    if groups == num_heads:
        return x
    return x.unsqueeze(3).expand(*x.shape[:3], num_heads // groups, *x.shape[3:]).flatten(2, 3)


def blocks_below(a: Tensor, level: int) -> Tensor:
    """``[..., C, C]`` to ``[..., P, s, s]`` with ``s = 2 ** level``: right halves as queries, left ones as keys."""
    half = 1 << level
    tiles = a.unflatten(-2, (-1, 2, half))[..., 1, :, :].unflatten(-1, (-1, 2, half))[..., 0, :]
    return tiles.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def merge_blocks(blocks: Tensor, below: Tensor) -> Tensor:
    """Diagonal blocks ``[..., 2 P, s, s]`` and the blocks under them ``[..., P, s, s]`` to ``[..., P, 2 s, 2 s]``."""
    left, right = _halves(blocks)
    top = torch.cat([left, torch.zeros_like(left)], -1)
    return torch.cat([top, torch.cat([below, right], -1)], -2)


def _pairs(x: Tensor, level: int) -> tuple[Tensor, ...]:
    """``[..., C, K]`` to left and right halves, ``[..., P, s, K]`` each, with ``s = 2 ** level``."""
    return x.unflatten(-2, (-1, 2, 1 << level)).unbind(-3)


def _halves(x: Tensor) -> tuple[Tensor, ...]:
    """``[..., 2 P, s, K]`` to left and right halves, ``[..., P, s, K]`` each."""
    return x.unflatten(-3, (-1, 2)).unbind(-3)

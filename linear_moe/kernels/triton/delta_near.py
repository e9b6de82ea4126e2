# mypy: allow-untyped-defs
"""Sums of log decays, as the levels of diag_levels.py want them, by blocks of 16 tokens: products of one warp.

What is summed for a token is a part of its own block of 16, by a product with a block on the diagonal of
``level_sums``, and whole blocks before or after it. As there, nothing is ever subtracted. Products of 16 x 16 leave the
tables, and what a level makes of q and k, in registers, where those of whole chunks pass everything through shared
memory: that is what the kernels of a vector decay waited for.

Letters: C tokens in a chunk, N = C / 16, BK a block of K; tiles are [N, 16, BK].
"""

import triton
import triton.language as tl


@triton.jit
def near_sums(table, entry, high, low, C: tl.constexpr):
    """Sums inside of blocks of 16: of a level below 4, or, for LEVELS and LEVELS + 1, up to a token and after it."""
    i = tl.arange(0, 16)
    b_sums = tl.load(table + entry * (C * C) + i[:, None] * C + i[None, :])
    return product(tl.broadcast_to(b_sums[None], (C // 16, 16, 16)), high, low)


@triton.jit
def near_sums_of(table, level, high, low, C: tl.constexpr):
    """The same of a level from 4 on, where blocks of readers and of writers differ."""
    n, i = tl.arange(0, C // 16), tl.arange(0, 16)
    i_sums = n[:, None, None] * (16 * C + 16) + i[None, :, None] * C + i[None, None, :]
    return product(tl.load(table + level * (C * C) + i_sums), high, low)


@triton.jit
def far_sums(sums, level, C: tl.constexpr):
    """What else belongs to sums of such a level, of other blocks; ``sums`` [N, BK] are of whole ones."""
    n = tl.arange(0, C // 16)
    half = n >> (level - 4)
    before, after = n[None, :] < n[:, None], n[None, :] > n[:, None]
    is_in = (half[None, :] == half[:, None]) & tl.where((half % 2 == 1)[:, None], before, after)
    return of_blocks(sums, is_in)


@triton.jit
def of_blocks(sums, is_in):
    """[N, 1, BK]: of each block those of ``sums`` [N, BK] that are in, added."""
    return tl.sum(tl.where(is_in[:, :, None], sums[None, :, :], 0.0), 1)[:, None, :]


@triton.jit
def product(table, high, low):
    """Of 0/1 matrices with both parts of numbers; in single precision the first is all of it."""
    b_sum = tl.dot(table, high, input_precision="ieee")
    if high.dtype != tl.float32:
        b_sum = tl.dot(table, low, b_sum, input_precision="ieee")
    return b_sum


@triton.jit
def on_diagonal(blocks, C: tl.constexpr):
    """[C, C] with these [N, 16, 16] blocks on its diagonal, and zeros."""
    n = tl.arange(0, C // 16)
    is_diagonal = n[:, None, None, None] == n[None, None, :, None]
    return tl.reshape(tl.where(is_diagonal, blocks[:, :, None, :], 0.0), (C, C))

# mypy: allow-untyped-defs
"""Decays of single elements inside a chunk, without a positive exponent: pairs of tokens by the bit they differ in.

    score(i, j) = sum_k x_i[k] y_j[k] 2^(sum of log2 a[k] over tokens j + 1 .. i)           i > j, both in one chunk

2^(g_i - g_j) has no factors that depend on i and on j alone and are both in range. But let l be the highest bit in
which i and j differ: then i is in the second and j in the first half of one block of 2^(l + 1) tokens, and with the
decay up to the border between the halves as the writer's factor and the decay from there as the reader's, both are at
most 1.
At one level every token has one role, so that one tile holds readers and writers, and all its pairs are one product:

    z_t = x_t 2^before_t  or  y_t 2^after_t          scores = z z^T, kept where the highest differing bit is l

``before`` sums log2 a from the start of the token's block of 2^l tokens up to the token (exclusive of it, where a token
reads before the memory decays), ``after`` from the next token to the end of the block. Both are products with matrices
of 0 and 1 (``level_sums``), of two rounded parts of log2 a in half precision: sums of non-positive numbers, nothing is
ever subtracted. So the tensor cores do all but C x K exponentials for each of log2 C levels. A secondary chunk of 16
tokens (arXiv:2312.06635, section 4.3) needs 16 x 16 x K of them for each of its diagonal blocks, 2.7 times as many in
all, and no tensor core can take part there.

Letters: C tokens in a chunk, D width of x and y, BD a block of it, H heads, L tokens of all rows, M chunks
(``chunk_slot``). ``X_PER`` heads of the scan share one head of x.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.triton.decay_sums import LOG2_E, LOG_FORGET


@cache
@torch.inference_mode(False)  # or it could not be saved for a later backward pass
def level_sums(chunk: int, reads_first: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[3, LEVELS + 2, C, C]`` of 0 and 1; first [i, t]: whether the sum of token i contains log2 a of token t.

    One entry for each level; then what token i reads of the memory before the chunk, and what is left of its write at
    the end of the chunk. Second the same transposed. Third, for each level, which pairs of tokens are of it.
    Made on the host and kept: there when this returns, whatever stream uses it next, and never part of a CUDA graph.
    """
    token = torch.arange(chunk, device="cpu")
    i, t = token[:, None], token[None, :]
    up_to = t < i if reads_first else t <= i
    levels = range(chunk.bit_length() - 1)
    sums = [((i ^ t) < 2**n) & torch.where((i & 2**n) != 0, up_to, t > i) for n in levels]
    table = torch.stack([*sums, up_to, t > i])
    is_level = torch.stack([((i ^ t) >= 2**n) & ((i ^ t) < 2 ** (n + 1)) for n in (*levels, 62, 62)])
    return torch.stack([table, table.mT, is_level]).to(dtype).contiguous().to(device)


@triton.jit
def halves(x, dtype: tl.constexpr):
    """Two parts of ``x`` for products in half precision; in single, the first is all of it."""
    high = x.to(dtype)
    return high, (x - high.to(tl.float32)).to(dtype)


@triton.jit
def for_scores(x, dtype: tl.constexpr):
    """A factor of scores: TF32 instead of bfloat16, the rounding of which would be half of what outputs are off by."""
    if dtype == tl.bfloat16:
        nearest = x.to(tl.int32, bitcast=True) + 0x1000  # products leave the last 13 bits out
        return nearest.to(tl.float32, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def sum_over(sums, level, high, low):
    """[C, BD]: sums of log2 a by one of ``level_sums``."""
    C: tl.constexpr = high.shape[0]
    i_C = tl.arange(0, C)
    b_sums = tl.load(sums + level * (C * C) + i_C[:, None] * C + i_C[None, :])
    b_sum = tl.dot(b_sums, high, input_precision="ieee")
    if high.dtype != tl.float32:
        b_sum = tl.dot(b_sums, low, b_sum, input_precision="ieee")
    return b_sum


@triton.jit
def load_log_decay(p_a, mask):
    """log2 a, finite."""
    log_a = tl.load(p_a, mask=mask, other=0.0).to(tl.float32)
    return tl.where(log_a < LOG_FORGET, LOG_FORGET, log_a) * LOG2_E


@triton.jit
def load_roles(x, y, x_t, y_t, i_D, half, left, m_D, C: tl.constexpr):
    """[C, BD]: x of the readers and y of the writers of a level."""
    i_C = tl.arange(0, C)
    p_z = tl.where((i_C & half) != 0, x + i_C * x_t, y + i_C * y_t)
    return tl.load(p_z[:, None] + i_D[None, :], mask=(i_C[:, None] < left) & m_D[None, :], other=0.0)

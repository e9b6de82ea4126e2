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
from linear_moe.kernels.triton.layout import chunk_slot, segment_of


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


@triton.jit(do_not_specialize=["num_tokens", "segments_per_row", "num_documents", "chunks_per_segment"])
def scale_kernel(
    x, y, log_decay,  # [B, T, H, D], any strides; log_decay even in its last dim
    bonus,  # [H, D] float32, or nothing
    scaled_x, scaled_y,  # [L, H, D]: what reads the memory before the chunk, what is written to the memory after it
    pairs,  # [L, H, C]: what each token takes from the tokens of its chunk
    totals,  # [M, H, D] float32: log2 of what the chunk keeps
    sums,  # level_sums
    plan,
    num_tokens, num_heads: tl.constexpr, segment_size, segments_per_row, num_documents, chunks_per_segment, scale,
    x_b, x_h, y_b, y_h, a_b, a_h,
    x_t: tl.constexpr, y_t: tl.constexpr, a_t: tl.constexpr, a_d: tl.constexpr,
    X_PER: tl.constexpr, Y_PER: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, HAS_X: tl.constexpr, HAS_BONUS: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: chunks of all segments, heads. Without x there are no pairs."""
    segment = tl.program_id(0) // chunks_per_segment
    chunk = tl.program_id(0) % chunks_per_segment
    head = tl.program_id(1)
    row, start, length, readable = segment_of(
        plan, segment, num_tokens, segment_size, segments_per_row, num_documents, IS_PACKED
    )
    row, start = row.to(tl.int64), start.to(tl.int64)
    if chunk * C < length:
        first = start + chunk * C
        token = row * num_tokens + start
        slot = chunk_slot(token, segment, chunk, C)
        left = readable - chunk * C
        x += row * x_b + first * x_t + (head // X_PER).to(tl.int64) * x_h
        y += row * y_b + first * y_t + (head // Y_PER).to(tl.int64) * y_h
        log_decay += row * a_b + first * a_t + head.to(tl.int64) * a_h
        of_chunk = (token + chunk * C) * num_heads + head
        i_C = tl.arange(0, C)
        b_pairs = tl.zeros([C, C], tl.float32)
        for block in range(0, D, BD):
            i_D = block + tl.arange(0, BD)
            m_D = i_D < D
            mask = (i_C[:, None] < left) & m_D[None, :]
            b_a = load_log_decay(log_decay + i_C[:, None] * a_t + i_D[None, :] * a_d, mask)  # [C, BD]
            tl.store(totals + (slot * num_heads + head) * D + i_D, tl.sum(b_a, 0), mask=m_D)
            high, low = halves(b_a, scaled_y.dtype.element_ty)
            if HAS_X:
                half = 1
                for level in range(LEVELS):
                    b_factor = tl.exp2(sum_over(sums, level, high, low))
                    b_z = load_roles(x, y, x_t, y_t, i_D, half, left, m_D, C)
                    b_z = (b_z.to(tl.float32) * b_factor).to(scaled_y.dtype.element_ty)
                    b_level = tl.dot(b_z, tl.trans(b_z), input_precision="ieee")  # [C, C]
                    is_level = tl.load(
                        sums + (2 * (LEVELS + 2) + level) * C * C + i_C[:, None] * C + i_C[None, :]
                    )
                    b_pairs += b_level * is_level
                    half *= 2
            p_D = i_C[:, None] * (num_heads * D) + i_D[None, :]
            b_y = tl.load(y + i_C[:, None] * y_t + i_D[None, :], mask=mask, other=0.0).to(tl.float32)
            if HAS_X:
                b_x = tl.load(x + i_C[:, None] * x_t + i_D[None, :], mask=mask, other=0.0).to(tl.float32)
                own = b_x * b_y
                if HAS_BONUS:
                    own *= tl.load(bonus + head * D + i_D, mask=m_D, other=0.0)[None, :]
                own = tl.sum(own, 1)
                b_pairs = tl.where(i_C[:, None] == i_C[None, :], b_pairs + own[:, None], b_pairs)
                b_scaled = b_x * (tl.exp2(sum_over(sums, LEVELS, high, low)) * scale)
                tl.store(scaled_x + of_chunk * D + p_D, b_scaled.to(scaled_x.dtype.element_ty), mask=mask)
            b_scaled = b_y * tl.exp2(sum_over(sums, LEVELS + 1, high, low))
            tl.store(scaled_y + of_chunk * D + p_D, b_scaled.to(scaled_y.dtype.element_ty), mask=mask)
        if HAS_X:
            b_pairs = tl.where(i_C[:, None] >= i_C[None, :], b_pairs * scale, 0.0)
            p_pairs = pairs + of_chunk * C + i_C[:, None] * (num_heads * C) + i_C[None, :]
            tl.store(p_pairs, b_pairs.to(pairs.dtype.element_ty), mask=i_C[:, None] < left)

# mypy: allow-untyped-defs
"""Decays of single elements inside a chunk, without a positive exponent: pairs of tokens by the bit they differ in.

    score(i, j) = sum_k x_i[k] y_j[k] 2^(sum of log2 a[k] over tokens j + 1 .. i)           i > j, both in one chunk

2^(g_i - g_j) has no factors that depend on i and on j alone and are both in range. But let l be the highest bit in
which i and j differ: then i is in the second and j in the first half of one block of 2^(l + 1) tokens, and with the
decay up to the border between the halves as the writer's factor and the decay from there as the reader's, both are at
most 1.
At one level every token has one role, so that one tile holds readers and writers, and all its pairs are one product:

    z_t = x_t 2^before_t  or  y_t 2^after_t          scores = z z^T, kept where the highest differing bit is l

``before`` sums log2 a from the start of the token's block of 2^l tokens up to the token, ``after`` from the next token
to the end of the block. From level to level both grow by sums over the sibling block, nothing is ever subtracted, and
at the last level they are what the chunk reads from the memory before it and leaves behind.

A secondary chunk of 16 tokens (arXiv:2312.06635, section 4.3) needs 16 x 16 x K exponentials on its diagonal; this
needs C x K for each of log2 C levels, and the tensor cores for all of the rest.

Letters: C tokens in a chunk, D width of x and y, BD a block of it, H heads, L tokens of all rows, M chunks
(``chunk_slot``). ``X_PER`` heads of the scan share one head of x.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.decay_sums import LOG2_E, LOG_FORGET
from linear_moe.kernels.triton.layout import chunk_slot, segment_of


@triton.jit
def next_level(before, after, log_a, LEVEL: tl.constexpr):
    """``before`` (exclusive of the token) and ``after`` for blocks twice as large."""
    i_C = tl.arange(0, before.shape[0])
    sibling_end = (((i_C >> LEVEL) ^ 1) << LEVEL) | ((1 << LEVEL) - 1)
    index = tl.broadcast_to(sibling_end[:, None], before.shape[0], before.shape[1])
    of_sibling = tl.gather(before + log_a, index, 0)  # the sum over the whole block, at its last token
    is_reader = ((i_C >> LEVEL) & 1)[:, None] == 1
    return tl.where(is_reader, before + of_sibling, before), tl.where(is_reader, after, after + of_sibling)


@triton.jit
def load_log_decay(p_a, mask):
    """log2 a, finite."""
    log_a = tl.load(p_a, mask=mask, other=0.0).to(tl.float32)
    return tl.where(log_a < LOG_FORGET, LOG_FORGET, log_a) * LOG2_E


@triton.jit(do_not_specialize=["num_tokens", "segments_per_row", "num_documents"])
def scale_kernel(
    x, y, log_decay,  # [B, T, H, D], any strides; log_decay even in its last dim
    bonus,  # [H, D] float32, or nothing
    scaled_x, scaled_y,  # [L, H, D]: what reads the memory before the chunk, what is written to the memory after it
    pairs,  # [L, H, C]: what each token takes from the tokens of its chunk
    totals,  # [M, H, D] float32: log2 of what the chunk keeps
    plan,
    num_tokens, num_all, num_heads, segment_size, segments_per_row, num_documents, chunks_per_segment, scale,
    x_b, x_t, x_h, y_b, y_t, y_h, a_b, a_t, a_h, a_d,
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
    if chunk * C < length:
        row, first = row.to(tl.int64), start.to(tl.int64) + chunk * C
        token = row * num_tokens + start
        slot = chunk_slot(token, segment, chunk, C)
        left = readable - chunk * C
        x += row * x_b + first * x_t + (head // X_PER).to(tl.int64) * x_h
        y += row * y_b + first * y_t + (head // Y_PER).to(tl.int64) * y_h
        log_decay += row * a_b + first * a_t + head.to(tl.int64) * a_h
        of_chunk = (token + chunk * C) * num_heads + head
        i_C = tl.arange(0, C)
        differ = i_C[:, None] ^ i_C[None, :]
        b_pairs = tl.zeros([C, C], tl.float32)
        for block in range(0, D, BD):
            i_D = block + tl.arange(0, BD)
            mask = (i_C[:, None] < left) & (i_D[None, :] < D)
            p_a = log_decay + i_C[:, None].to(tl.int64) * a_t + i_D[None, :] * a_d
            b_a = load_log_decay(p_a, mask)  # [C, BD]
            b_y = tl.load(y + i_C[:, None] * y_t + i_D[None, :], mask=mask, other=0.0)
            before, after = tl.zeros([C, BD], tl.float32), tl.zeros([C, BD], tl.float32)
            if HAS_X:
                b_x = tl.load(x + i_C[:, None] * x_t + i_D[None, :], mask=mask, other=0.0)
                own = b_x.to(tl.float32) * b_y.to(tl.float32)
                if HAS_BONUS:
                    own *= tl.load(bonus + head * D + i_D, mask=i_D < D, other=0.0)[None, :]
                own_score = tl.sum(own, 1)
                b_pairs = tl.where(differ == 0, b_pairs + own_score[:, None], b_pairs)
            for level in tl.static_range(LEVELS):
                if HAS_X:
                    is_reader = ((i_C >> level) & 1)[:, None] == 1
                    read = before if HAS_BONUS else before + b_a
                    factor = tl.exp2(tl.where(is_reader, read, after))
                    b_z = (tl.where(is_reader, b_x, b_y).to(tl.float32) * factor).to(b_y.dtype)
                    b_level = tl.dot(b_z, tl.trans(b_z), input_precision="ieee")  # [C, C]
                    is_level = ((differ >> level) == 1) & (i_C[:, None] > i_C[None, :])
                    b_pairs = tl.where(is_level, b_pairs + b_level, b_pairs)
                before, after = next_level(before, after, b_a, level)
            p_D = of_chunk * D + i_C[:, None].to(tl.int64) * num_heads * D + i_D[None, :]
            if HAS_X:
                read = before if HAS_BONUS else before + b_a
                b_scaled = b_x.to(tl.float32) * (tl.exp2(read) * scale)
                tl.store(scaled_x + p_D, b_scaled.to(scaled_x.dtype.element_ty), mask=mask)
            b_scaled = b_y.to(tl.float32) * tl.exp2(after)
            tl.store(scaled_y + p_D, b_scaled.to(scaled_y.dtype.element_ty), mask=mask)
            tl.store(totals + (slot * num_heads + head) * D + i_D, tl.sum(b_a, 0), mask=i_D < D)
        if HAS_X:
            p_pairs = pairs + of_chunk * C + i_C[:, None].to(tl.int64) * num_heads * C + i_C[None, :]
            tl.store(p_pairs, (b_pairs * scale).to(pairs.dtype.element_ty), mask=i_C[:, None] < left)

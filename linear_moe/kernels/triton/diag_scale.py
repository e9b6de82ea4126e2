# mypy: allow-untyped-defs
"""Everything of the inside of chunks that has an exponential: what the scan of diag_vector_scan.py reads.

Chunk by chunk: x with the decay since the chunk's start, y with the decay up to its end, and the pairs, by one border
(diag_weak.py) where every column's decay allows it, else by levels (diag_levels.py).

Letters: as in diag_levels.py.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.diag_levels import halves, load_log_decay, load_roles, sum_over
from linear_moe.kernels.triton.diag_weak import scale_weak
from linear_moe.kernels.triton.layout import chunk_slot, segment_of


@triton.jit
def scale_levels(
    b_pairs, x, y, log_decay, bonus, scaled_x, scaled_y, sums, i_D, m_D, x_t, y_t, a_t, a_d, out_t, left, scale,
    LEVELS: tl.constexpr, HAS_X: tl.constexpr, HAS_BONUS: tl.constexpr,
):  # fmt: skip
    """One block of columns; pairs over scale are added to ``b_pairs``."""
    C: tl.constexpr = b_pairs.shape[0]
    dtype: tl.constexpr = scaled_y.dtype.element_ty
    i_C = tl.arange(0, C)
    i_CC = i_C[:, None] * C + i_C[None, :]
    mask = (i_C[:, None] < left) & m_D[None, :]
    b_a = load_log_decay(log_decay + i_C[:, None] * a_t + i_D[None, :] * a_d, mask)  # [C, BD]
    high, low = halves(b_a, dtype)
    if HAS_X:
        half = 1
        for level in range(LEVELS):
            b_factor = tl.exp2(sum_over(sums, level, high, low))
            b_z = load_roles(x, y, x_t, y_t, i_D, half, left, m_D, C)
            b_z = (b_z.to(tl.float32) * b_factor).to(dtype)
            b_level = tl.dot(b_z, tl.trans(b_z), input_precision="ieee")  # [C, C]
            b_pairs += b_level * tl.load(sums + (2 * (LEVELS + 2) + level) * C * C + i_CC)
            half *= 2
    i_out = i_C[:, None] * out_t + i_D[None, :]
    b_y = tl.load(y + i_C[:, None] * y_t + i_D[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_X:
        b_x = tl.load(x + i_C[:, None] * x_t + i_D[None, :], mask=mask, other=0.0).to(tl.float32)
        own = b_x * b_y
        if HAS_BONUS:
            own *= tl.load(bonus + i_D, mask=m_D, other=0.0)[None, :]
        b_pairs = tl.where(i_C[:, None] == i_C[None, :], b_pairs + tl.sum(own, 1)[:, None], b_pairs)
        b_scaled = b_x * (tl.exp2(sum_over(sums, LEVELS, high, low)) * scale)
        tl.store(scaled_x + i_out, b_scaled.to(dtype), mask=mask)
    b_scaled = b_y * tl.exp2(sum_over(sums, LEVELS + 1, high, low))
    tl.store(scaled_y + i_out, b_scaled.to(dtype), mask=mask)
    return b_pairs


@triton.jit(do_not_specialize=["num_tokens", "segments_per_row", "num_documents", "chunks_per_segment"])
def diag_scale_kernel(
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
    LEVELS: tl.constexpr, LEAST: tl.constexpr, HAS_X: tl.constexpr, HAS_BONUS: tl.constexpr,
    IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: chunks of all segments, heads. Without x there are no pairs.

    A block of columns of which the chunk keeps 2^LEAST or more goes by one border, another by levels.
    """
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
        of_tokens = of_chunk * D
        scaled_x += of_tokens
        scaled_y += of_tokens
        bonus += head * D
        out_t: tl.constexpr = num_heads * D
        i_C = tl.arange(0, C)
        b_pairs = tl.zeros([C, C], tl.float32)
        for block in range(0, D, BD):
            i_D = block + tl.arange(0, BD)
            m_D = i_D < D
            mask = m_D[:, None] & (i_C[None, :] < left)
            b_a = load_log_decay(log_decay + i_D[:, None] * a_d + i_C[None, :] * a_t, mask)  # [BD, C]
            b_total = tl.sum(b_a, 1)
            tl.store(totals + (slot * num_heads + head) * D + i_D, b_total, mask=m_D)
            if HAS_X and LEAST < 0 and tl.min(b_total, 0) >= LEAST:
                b_pairs = scale_weak(
                    b_pairs, x, y, b_a, b_total, scaled_x, scaled_y, sums, i_D, m_D,
                    x_t, y_t, out_t, left, scale, LEVELS,
                )  # fmt: skip
            else:
                b_pairs = scale_levels(
                    b_pairs, x, y, log_decay, bonus, scaled_x, scaled_y, sums, i_D, m_D,
                    x_t, y_t, a_t, a_d, out_t, left, scale, LEVELS, HAS_X, HAS_BONUS,
                )  # fmt: skip
        if HAS_X:
            b_pairs = tl.where(i_C[:, None] >= i_C[None, :], b_pairs * scale, 0.0)
            p_pairs = pairs + of_chunk * C + i_C[:, None] * (num_heads * C) + i_C[None, :]
            tl.store(p_pairs, b_pairs.to(pairs.dtype.element_ty), mask=i_C[:, None] < left)

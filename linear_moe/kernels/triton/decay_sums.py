# mypy: allow-untyped-defs
"""Sums of log decays inside chunks, and the gradient of every log decay from its parts.

    g_t = sum of log2 a over tokens start .. t of the chunk                  kept as a sum of two float32
    d log a_t = sum_{i >= t} read_i + sum_{j < t} write_j + through                  i, j in the chunk of t

A difference g_i - g_j of single float32 sums would lose a weak decay that follows strong ones; the two floats come
from float64 and keep it. docs/kernels.md derives the gradient: ``read`` is what token i reads of the memory before the
chunk, plus what it reads of its chunk less what its chunk reads of it (of itself nothing, which does not decay; these
sum to 0), ``write`` what token j leaves behind it, ``through`` what only passes. The well-known sum of q dq - k dk over
the whole sequence is the same in exact arithmetic, and mostly noise in bfloat16: its terms are larger than their sum.

``through`` is the inner product of the memory before the chunk, decayed to its end, with the gradient of the memory
after it. It is computed for the last chunk of a segment and every ``EVERY``-th before it; in between,
through(c - 1) = through(c) + sum(read of c) - sum(write of c - 1). At the end of a document, whose last token writes
undecayed, nothing is subtracted.

Letters: S segments, H heads, C tokens in a chunk, L tokens of all rows, PR and PW partial sums, G groups of ``EVERY``
chunks in a segment.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.layout import chunk_slot, mask_if, segment_of

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# exp of it is 0 in float32; sums of it stay finite (-inf minus -inf is NaN), and small enough for one float32
LOG_FORGET: tl.constexpr = tl.constexpr(-140.0)


@triton.jit
def sums_of(sums, token, segment, chunk, head, num_heads, C: tl.constexpr):
    """Where the sums of a chunk and head are; ``token`` is the first of the segment."""
    return sums + (tl.cast(chunk_slot(token, segment, chunk, C), tl.int64) * num_heads + head) * (2 * C)


@triton.jit
def chunk_decay(log_decay, sums, head, left, DECAY: tl.constexpr, C: tl.constexpr, HAS_LOW: tl.constexpr):
    """g of each token and of the last one, high and low parts. ``left`` tokens exist; the others repeat the last g.

    ``sums`` are those of the chunk. Without ``HAS_LOW``, for half precision, the low parts are 0: a weak decay after
    total ones is off by 3e-4.
    """
    i_C = tl.arange(0, C)
    if DECAY == 1:  # one number per head
        left = tl.minimum(tl.maximum(left, 0), C)
        log_a = tl.load(log_decay + head).to(tl.float64 if HAS_LOW else tl.float32)
        log_a = tl.where(log_a < LOG_FORGET, LOG_FORGET, log_a) * LOG2_E
        g, last = log_a * tl.minimum(i_C + 1, left), log_a * left
        high, last_high = g.to(tl.float32), last.to(tl.float32)
        low, last_low = (g - high).to(tl.float32), (last - last_high).to(tl.float32)
    else:
        high, last_high = tl.load(sums + i_C), tl.load(sums + C - 1)
        low, last_low = high * 0.0, last_high * 0.0
        if HAS_LOW:
            low, last_low = tl.load(sums + C + i_C), tl.load(sums + 2 * C - 1)
    return high, low, last_high, last_low


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "segments_per_row",
        "num_documents",
        "chunks_per_segment",
        "a_b",
    ]
)
def decay_sums_kernel(
    log_decay,  # [B, T, H], any strides
    sums,  # [chunks, H, 2, C] float32: high parts, low parts
    plan,
    num_tokens, num_heads, segment_size, segments_per_row, num_documents, chunks_per_segment,
    a_b, a_t, a_h,
    BH: tl.constexpr, C: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: chunks of all segments, blocks of heads."""
    segment = tl.program_id(0) // chunks_per_segment
    chunk = tl.program_id(0) % chunks_per_segment
    row, start, length, readable = segment_of(
        plan, segment, num_tokens, segment_size, segments_per_row, num_documents, IS_PACKED
    )
    i_C, i_H = tl.arange(0, C), tl.program_id(1) * BH + tl.arange(0, BH)
    i_T = chunk * C + i_C
    m_H = i_H[None, :] < num_heads
    log_decay += row.to(tl.int64) * a_b + start.to(tl.int64) * a_t
    p_a = log_decay + i_T[:, None].to(tl.int64) * a_t + i_H[None, :] * a_h
    log_a = tl.load(p_a, mask=m_H & (i_T[:, None] < readable), other=0.0).to(tl.float64)  # [C, BH]
    log_a = tl.where(log_a < LOG_FORGET, LOG_FORGET, log_a) * LOG2_E
    g = tl.cumsum(log_a, 0)  # after the last token it stays as it is
    high = g.to(tl.float32)
    low = (g - high.to(tl.float64)).to(tl.float32)
    mask = mask_if(m_H, chunk * C < length)
    p_high = (
        sums_of(sums, row * num_tokens + start, segment, chunk, i_H[None, :], num_heads, C) + i_C[:, None]
    )
    tl.store(p_high, high, mask=mask)
    tl.store(p_high + C, low, mask=mask)


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "segments_per_row",
        "num_documents",
        "num_all",
        "num_groups",
        "G",
    ]
)
def decay_gradient_kernel(
    read, write,  # [PR, H, L] and [PW, H, L] float32
    through,  # [PW, num_groups, H] float32
    grad,  # [B, T, H] float32 contiguous, or [S, G, H] for a decay per head
    plan,
    num_tokens, num_heads, segment_size, segments_per_row, num_documents, num_groups, num_all,
    C: tl.constexpr, EVERY: tl.constexpr, PR: tl.constexpr, PW: tl.constexpr, BP: tl.constexpr, G,
    DECAY: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: groups of chunks of all segments, heads. From the end of the group to its start."""
    segment, group, head = tl.program_id(0) // G, tl.program_id(0) % G, tl.program_id(1)
    row, start, length, readable = segment_of(
        plan, segment, num_tokens, segment_size, segments_per_row, num_documents, IS_PACKED
    )
    i_C, i_P = tl.arange(0, C), tl.arange(0, BP)
    first = row * num_tokens + start
    last_chunk = tl.cdiv(length, C) - 1 - group * EVERY

    place = chunk_slot(first.to(tl.int64), segment, group, C * EVERY)
    p_through = through + (i_P * tl.cast(num_groups, tl.int64) + place) * num_heads + head
    m_through = mask_if(i_P < PW, (last_chunk >= 0) & (readable > 0))
    b_through = tl.sum(tl.load(p_through, mask=m_through, other=0.0), 0)
    of_head = 0.0
    for step in range(0, EVERY):
        i_T = (last_chunk - step) * C + i_C
        is_token = (i_T >= 0) & (i_T < readable)
        p_PC = (i_P[:, None] * num_heads + head).to(tl.int64) * num_all + first + i_T[None, :]
        m_read, m_write = (i_P[:, None] < PR) & is_token[None, :], (i_P[:, None] < PW) & is_token[None, :]
        b_read = tl.sum(tl.load(read + p_PC, mask=m_read, other=0.0), 0)  # [C]
        b_write = tl.sum(tl.load(write + p_PC, mask=m_write, other=0.0), 0)
        earlier = tl.sum(tl.load(write + p_PC - 1, mask=m_write & (i_C[None, :] > 0), other=0.0), 0)
        if step > 0:
            b_through -= tl.sum(b_write, 0)
        b_grad = tl.cumsum(b_read, 0, reverse=True) + tl.cumsum(earlier, 0) + b_through
        b_grad = tl.where(is_token, b_grad, 0.0)
        b_through += tl.sum(b_read, 0)
        if DECAY == 1:
            of_head += tl.sum(b_grad, 0)
        else:
            p_grad = grad + (first + i_T).to(tl.int64) * num_heads + head
            tl.store(p_grad, b_grad, mask=(i_T >= 0) & (i_T < length))
    if DECAY == 1:
        tl.store(grad + (segment.to(tl.int64) * G + group) * num_heads + head, of_head)

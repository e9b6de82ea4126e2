# mypy: allow-untyped-defs
"""Outputs of the delta rule from what the scan left: all chunks at once.

    o = scale * read * (Q S) + P e

With a vector decay (``DECAY == 3``) read is in the rows of Q that it is given.

Letters: S chunks of all documents, H heads, C tokens in a chunk, DK and DV the dims of q and v, BK >= DK, BV a block
of DV, NV blocks of it, L tokens of all rows.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.delta_chunk import factors
from linear_moe.kernels.triton.layout import mask_if, segment_of


@triton.jit(do_not_specialize=["num_tokens", "chunks_per_row", "num_documents"])
def delta_output_kernel(
    q_read, log_decay, sums, plan,
    scores, scores_low,  # [S, H, C, C]: P, and what its rounding left out, with HAS_LOW
    states,  # [S, H, DK, DV]: the memory before each chunk
    errors,  # [L, H, DV]: e
    o,  # [L, H, DV]
    num_tokens, num_heads: tl.constexpr, chunks_per_row, num_documents, scale,
    q_b, q_t: tl.constexpr, q_h,
    K_PER: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, DECAY: tl.constexpr, HAS_LOW: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: S * H * NV."""
    NV: tl.constexpr = (DV + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    head = (tl.program_id(0) // NV) % num_heads
    chunk = tl.program_id(0) // NV // num_heads
    row, start, length, left = segment_of(
        plan, chunk, num_tokens, C, chunks_per_row, num_documents, IS_PACKED
    )
    i_C, i_K, i_V = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_K, m_V = (i_K < DK) | (DK == BK), (i_V < DV) | (DV % BV == 0)
    m_S, m_v = m_K[:, None] & m_V[None, :], (i_C[:, None] < left) & m_V[None, :]
    token = row * num_tokens + start
    tile = chunk.to(tl.int64) * num_heads + head
    o_t: tl.constexpr = num_heads * DV
    i_o = token.to(tl.int64) * o_t + head * DV + i_C[:, None] * o_t + i_V[None, :]
    q_read += row.to(tl.int64) * q_b + start.to(tl.int64) * q_t + (head // K_PER).to(tl.int64) * q_h

    m_q = (i_C[:, None] < left) & m_K[None, :]
    b_q = tl.load(q_read + i_C[:, None] * q_t + i_K[None, :], mask=m_q, other=0.0)  # [C, BK]
    p_S = states + tile * (DK * DV) + i_K[:, None] * DV + i_V[None, :]
    b_S = tl.load(p_S, mask=mask_if(m_S, left > 0), other=0.0)  # [BK, BV]
    i_P = tile * (C * C) + i_C[:, None] * C + i_C[None, :]
    m_P = (i_C[:, None] < left) & (i_C[None, :] < left)
    b_P = tl.load(scores + i_P, mask=m_P, other=0.0)  # [C, C]
    if HAS_LOW:
        b_low = tl.load(scores_low + i_P, mask=m_P, other=0.0)
    b_e = tl.load(errors + i_o, mask=m_v, other=0.0)  # [C, BV]
    b_o = tl.dot(b_q, b_S, input_precision="ieee") * scale
    if (DECAY == 1) | (DECAY == 2):
        IS_SINGLE: tl.constexpr = o.dtype.element_ty == tl.float32
        read, _, _, _ = factors(
            log_decay, sums, head, num_heads, token, chunk, left, DECAY, False, C, IS_SINGLE
        )
        b_o = b_o * read[:, None]
    b_o = tl.dot(b_P, b_e, b_o, input_precision="ieee")
    if HAS_LOW:
        b_o = tl.dot(b_low, b_e, b_o, input_precision="ieee")
    if IS_PACKED:
        b_o = tl.where(i_C[:, None] < left, b_o, 0.0)  # after the last document even the decay may be NaN
    tl.store(o + i_o, b_o.to(o.dtype.element_ty), mask=(i_C[:, None] < length) & m_V[None, :])

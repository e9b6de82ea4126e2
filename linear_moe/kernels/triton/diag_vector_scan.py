# mypy: allow-untyped-defs
"""The scan over chunks for decays of single elements: diag_scale.py has put the inside of chunks into its inputs.

    rows       o = q S + pairs v,    S[k, :] <- 2^total[k] S[k, :] + k^T v
    columns    o = q S,              S[:, v] <- S[:, v] 2^total[v] + k^T v,         pairs = q k^T, as a result

There is no exponential but the one of ``total``. With x and y the vectors along the dimension that decays, scaled (q
and k of :func:`diag_decay`, or the gradient of o and v where columns decay), z and e the other two (v and the gradient
of o, or k and q), docs/kernels.md has these runs:

    run            q    k    v    S                                     pairs      gives
    rows           x    y    z    memory                                read       o  (or the gradient of q)
    columns        e    z    y    memory, transposed                    written    scaled gradient of x
    rows back      y    x    e    gradient of the memory                read^T     gradient of z
    columns back   z    e    x    the same, transposed                             scaled gradient of y, ``through``

Without ``HAS_OUTPUT`` it computes what a segment leaves in an empty memory, and what it keeps of the one before it.

Letters: C tokens in a chunk, DK width of q and k, DV of v and o, BK >= DK, BV a block of DV, NV blocks of it, H heads,
L tokens of all rows, S segments, D the width that decays (DK or DV), M chunks, G groups of ``EVERY`` chunks.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.layout import chunk_slot, mask_if, segment_of


@triton.jit(do_not_specialize=["num_tokens", "segments_per_row", "num_documents"])
def diag_scaled_scan_kernel(
    q, k, v, o,
    pairs,  # [L, H, C]
    totals,  # [M, H, D] float32: log2 of what a chunk keeps
    kept,  # [S, H, D] float32: what a segment keeps
    plan,
    before,  # [S, H, DK, DV] float32 (strides S_K, S_V): what S starts from, or nothing
    final,  # the same: what S ends with
    saved,  # [G, H, DK, DV] (strides S_K, S_V): S before every EVERY-th chunk, counted from the end
    through,  # [G, H, D] float32: what only passes through that chunk, times its gradient
    num_tokens, num_heads: tl.constexpr, segment_size, segments_per_row, num_documents,
    q_b, q_h, k_b, k_h, v_b, v_h, o_b, o_h,
    q_t: tl.constexpr, k_t: tl.constexpr, v_t: tl.constexpr, o_t: tl.constexpr,
    Q_PER: tl.constexpr, K_PER: tl.constexpr, V_PER: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    S_K: tl.constexpr, S_V: tl.constexpr, ROWS: tl.constexpr, REVERSE: tl.constexpr,
    HAS_OUTPUT: tl.constexpr, EVERY: tl.constexpr,
    HAS_BEFORE: tl.constexpr, STORE_FINAL: tl.constexpr, STORE_SAVED: tl.constexpr,
    STORE_THROUGH: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: S * H * NV; the blocks of one head are neighbours, so that the second finds q and k in L2."""
    NV: tl.constexpr = (DV + BV - 1) // BV
    D: tl.constexpr = DK if ROWS else DV
    i_v = tl.program_id(0) % NV
    head = (tl.program_id(0) // NV) % num_heads
    segment = tl.program_id(0) // NV // num_heads
    row, start, length, readable = segment_of(
        plan, segment, num_tokens, segment_size, segments_per_row, num_documents, IS_PACKED
    )
    i_C, i_K, i_V = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    row, first = row.to(tl.int64), start.to(tl.int64)
    q += row * q_b + first * q_t + (head // Q_PER).to(tl.int64) * q_h
    k += row * k_b + first * k_t + (head // K_PER).to(tl.int64) * k_h
    v += row * v_b + first * v_t + (head // V_PER).to(tl.int64) * v_h
    o += row * o_b + first * o_t + head.to(tl.int64) * o_h
    token = row * num_tokens + start  # of all rows

    i_S = i_K[:, None] * S_K + i_V[None, :] * S_V
    m_K, m_V = (i_K < DK) | (DK == BK), (i_V < DV) | (DV % BV == 0)
    m_S = m_K[:, None] & m_V[None, :]
    if ROWS:
        i_D, m_D = i_K, m_K
    else:
        i_D, m_D = i_V, m_V
    at = segment.to(tl.int64) * num_heads + head
    b_S = tl.zeros([BK, BV], tl.float32)
    b_kept = i_D * 0.0
    if HAS_BEFORE:
        b_S = tl.load(before + at * (DK * DV) + i_S, mask=mask_if(m_S, readable > 0), other=0.0)

    num_chunks = tl.cdiv(length if HAS_OUTPUT else readable, C)
    for step in range(0, num_chunks):
        chunk = num_chunks - 1 - step if REVERSE else step
        left = readable - chunk * C
        past = (chunk * C).to(tl.int64)
        m_C = i_C < left
        m_q, m_kT, m_v = m_C[:, None] & m_K[None, :], m_K[:, None] & m_C[None, :], m_C[:, None] & m_V[None, :]
        p_total = totals + (chunk_slot(token, segment, chunk, C) * num_heads + head) * D + i_D
        b_total = tl.load(p_total, mask=mask_if(m_D, left > 0), other=0.0)
        b_kT = tl.load(k + past * k_t + i_K[:, None] + i_C[None, :] * k_t, mask=m_kT, other=0.0)  # [BK, C]
        b_v = tl.load(v + past * v_t + i_C[:, None] * v_t + i_V[None, :], mask=m_v, other=0.0)  # [C, BV]
        group = chunk_slot(token, segment, (num_chunks - 1 - chunk) // EVERY, C * EVERY) * num_heads + head
        is_saved = (num_chunks - 1 - chunk) % EVERY == 0
        if STORE_SAVED and is_saved:
            tl.store(saved + group * (DK * DV) + i_S, b_S.to(saved.dtype.element_ty), mask=m_S)

        if HAS_OUTPUT:
            b_q = tl.load(q + past * q_t + i_C[:, None] * q_t + i_K[None, :], mask=m_q, other=0.0)  # [C, BK]
            b_o = tl.dot(b_q, b_S.to(b_q.dtype), input_precision="ieee")  # [C, BV]
            p_pairs = pairs + ((token + past) * num_heads + head) * C
            pairs_t = num_heads * C
            if ROWS:
                if REVERSE:  # the pairs of later readers with this writer
                    i_pairs = i_C[None, :] * pairs_t + i_C[:, None]
                    b_pairs = tl.load(p_pairs + i_pairs, mask=m_C[None, :] & m_C[:, None], other=0.0)
                else:
                    i_pairs = i_C[:, None] * pairs_t + i_C[None, :]
                    b_pairs = tl.load(p_pairs + i_pairs, mask=m_C[:, None], other=0.0)
                b_o = tl.dot(b_pairs, b_v, b_o, input_precision="ieee")
            if not ROWS and not REVERSE and i_v == 0:
                b_pairs = tl.dot(b_q, b_kT, input_precision="ieee")  # [C, C]
                b_pairs = tl.where(i_C[:, None] >= i_C[None, :], b_pairs, 0.0).to(pairs.dtype.element_ty)
                i_pairs = i_C[:, None] * pairs_t + i_C[None, :]
                tl.store(p_pairs + i_pairs, b_pairs, mask=m_C[:, None])
            m_o = (chunk * C + i_C[:, None] < length) & m_V[None, :]
            tl.store(o + past * o_t + i_C[:, None] * o_t + i_V[None, :], b_o.to(o.dtype.element_ty), mask=m_o)

        else:
            b_kept += b_total

        if ROWS:
            b_S = b_S * tl.exp2(b_total)[:, None]
        else:
            b_S = b_S * tl.exp2(b_total)[None, :]
        if STORE_THROUGH and is_saved:
            b_saved = tl.load(saved + group * (DK * DV) + i_S, mask=m_S, other=0.0).to(tl.float32)
            tl.store(through + group * D + i_V, tl.sum(b_S * b_saved, 0), mask=m_V)
        b_S = tl.dot(b_kT, b_v, b_S, input_precision="ieee")  # [BK, BV]

    if STORE_FINAL:
        tl.store(final + at * (DK * DV) + i_S, b_S, mask=m_S)
    if not HAS_OUTPUT:
        if ROWS:
            m_D = mask_if(m_D, i_v == 0)
        tl.store(kept + at * D + i_D, tl.exp2(b_kept), mask=m_D)

# mypy: allow-untyped-defs
"""The scan of a diagonal plus low-rank memory over the chunks of a document, and what tokens read of its memories.

    y = read S + A x       w = T y       S <- total * S + write_w^T w + write_x^T x          scan
    o = read S + A_w w + A_x x                                                               read, all chunks at once

                  S        read   A      T     write_w  write_x  x     w          o: read  A_w     A_x
    forward       memory   a      A_ak   T     b        k        v     w             q     A_qb    A_qk
    ``REVERSE``   its      b      A_qb^T T^T   a        q        do    z             k     A_ak^T  A_qk^T      (o is dv)
                  gradient

a and q as they read the memory before the chunk, b and k as they are written to the one after it, all from
dplr_chunk.py: the gradient of the scan is the scan itself, backward in time, of other arguments (docs/kernels_dplr.md).
A step is three dependent products; a program owns one document, one head and BV columns of S, which never leaves the
chip except in the dtype of the inputs, once for each chunk.

Long rows of few heads are cut in pieces, which the scan treats as documents; what a piece does to a memory is the same
scan with nothing kept but its end (``ONLY_FINAL``), of the identity without x (``HAS_X``) and of an empty memory.

Letters: S chunks of all documents, N documents (pieces), H heads, C tokens in a chunk, DK and DV the dims of k and v,
BK >= DK, BV a block of DV, NV blocks of it, L tokens of all rows.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.delta_scan import document_of
from linear_moe.kernels.triton.layout import mask_if, segment_of


@triton.jit
def load_tile(tiles, tile, left, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    """[C, C] of a chunk; zeros where there is no token."""
    i_C = tl.arange(0, C)
    if TRANSPOSED:
        p_tile = tiles + tile * (C * C) + i_C[:, None] + i_C[None, :] * C
    else:
        p_tile = tiles + tile * (C * C) + i_C[:, None] * C + i_C[None, :]
    return tl.load(p_tile, mask=(i_C[:, None] < left) & (i_C[None, :] < left), other=0.0)


@triton.jit(do_not_specialize=["num_tokens", "chunks_per_row", "pieces"])
def dplr_scan_kernel(
    read, write_w, write_x,  # [L, H, DK]
    x,
    scores, inverse,  # [S, H, C, C]: A, T - I
    totals, plan, first_chunk,
    initial, final,  # [N, H, DK, DV] float32; initial may be nothing
    states,  # [S, H, DK, DV]: the memory before each chunk
    w,  # [L, H, DV]
    num_tokens, num_heads: tl.constexpr, chunks_per_row, pieces,
    x_r, x_t: tl.constexpr, x_h,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_X: tl.constexpr, ONLY_FINAL: tl.constexpr, REVERSE: tl.constexpr,
    IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: N * H * NV; the blocks of one head are neighbours, so that the second finds the keys in L2."""
    dtype: tl.constexpr = inverse.dtype.element_ty
    NV: tl.constexpr = (DV + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    head = (tl.program_id(0) // NV) % num_heads
    document = tl.program_id(0) // NV // num_heads
    row, start, length, first, count = document_of(
        plan, first_chunk, document, num_tokens, chunks_per_row, pieces, C, IS_PACKED
    )
    i_C, i_K, i_V = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    token = (row * num_tokens + start).to(tl.int64)
    k_t: tl.constexpr = num_heads * DK
    w_t: tl.constexpr = num_heads * DV
    of_keys = token * k_t + head * DK
    x += row.to(tl.int64) * x_r + start.to(tl.int64) * x_t + head.to(tl.int64) * x_h
    w += token * w_t + head * DV

    m_K, m_V = (i_K < DK) | (DK == BK), (i_V < DV) | (DV % BV == 0)
    m_S, i_S = m_K[:, None] & m_V[None, :], i_K[:, None] * DV + i_V[None, :]
    of_document = (document.to(tl.int64) * num_heads + head) * (DK * DV)
    b_S = tl.zeros([BK, BV], tl.float32)
    if HAS_INITIAL:
        b_S = tl.load(initial + of_document + i_S, mask=m_S, other=0.0)

    for turn in range(0, count):
        step = count - 1 - turn if REVERSE else turn
        left = length - step * C
        past = tl.cast(step, tl.int64) * C
        m_C = i_C < left
        tile = tl.cast(first + step, tl.int64) * num_heads + head
        keys = of_keys + past * k_t
        m_v = m_C[:, None] & m_V[None, :]
        i_k, m_k = keys + i_C[:, None] * k_t + i_K[None, :], m_C[:, None] & m_K[None, :]
        i_kT, m_kT = keys + i_K[:, None] + i_C[None, :] * k_t, m_K[:, None] & m_C[None, :]
        b_read = tl.load(read + i_k, mask=m_k, other=0.0)  # [C, BK]
        b_T = load_tile(inverse, tile, left, C, REVERSE)
        b_of_w = tl.load(write_w + i_kT, mask=m_kT, other=0.0)  # [BK, C]
        p_total = totals + tile * DK + i_K
        total = tl.load(p_total, mask=m_K, other=0.0)

        b_state = b_S.to(dtype)
        if not ONLY_FINAL:
            tl.store(states + tile * (DK * DV) + i_S, b_state, mask=m_S)
        b_y = tl.dot(b_read, b_state, input_precision="ieee")  # [C, BV]
        b_S = b_S * total[:, None]
        if HAS_X:
            b_x = tl.load(x + past * x_t + i_C[:, None] * x_t + i_V[None, :], mask=m_v, other=0.0)
            b_y = tl.dot(load_tile(scores, tile, left, C, REVERSE), b_x, b_y, input_precision="ieee")
            b_of_x = tl.load(write_x + i_kT, mask=m_kT, other=0.0)
            b_S = tl.dot(b_of_x, b_x, b_S, input_precision="ieee")
        b_w = tl.dot(b_T, b_y.to(dtype), b_y, input_precision="ieee").to(dtype)
        if not ONLY_FINAL:
            tl.store(w + past * w_t + i_C[:, None] * w_t + i_V[None, :], b_w, mask=m_v)
        b_S = tl.dot(b_of_w, b_w, b_S, input_precision="ieee")
    tl.store(final + of_document + i_S, b_S, mask=m_S)


@triton.jit(do_not_specialize=["num_tokens", "chunks_per_row", "num_documents"])
def dplr_read_kernel(
    read,  # [L, H, DK]
    scores_w, scores_x,  # [S, H, C, C]: A_w, A_x
    states,  # [S, H, DK, DV]
    w,  # [L, H, DV]
    x, plan,
    o,  # [L, H, DV]
    num_tokens, num_heads: tl.constexpr, chunks_per_row, num_documents,
    x_r, x_t: tl.constexpr, x_h,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    HAS_X: tl.constexpr, REVERSE: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: S * H * NV. Tokens after the last document get zeros."""
    NV: tl.constexpr = (DV + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    head = (tl.program_id(0) // NV) % num_heads
    chunk = tl.program_id(0) // NV // num_heads
    row, start, length, left = segment_of(
        plan, chunk, num_tokens, C, chunks_per_row, num_documents, IS_PACKED
    )
    i_C, i_K, i_V = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_K, m_V = (i_K < DK) | (DK == BK), (i_V < DV) | (DV % BV == 0)
    m_k, m_v = (i_C[:, None] < left) & m_K[None, :], (i_C[:, None] < left) & m_V[None, :]
    token = (row * num_tokens + start).to(tl.int64)
    tile = chunk.to(tl.int64) * num_heads + head
    k_t: tl.constexpr = num_heads * DK
    o_t: tl.constexpr = num_heads * DV
    i_o = token * o_t + head * DV + i_C[:, None] * o_t + i_V[None, :]
    x += row.to(tl.int64) * x_r + start.to(tl.int64) * x_t + head.to(tl.int64) * x_h

    p_read = read + token * k_t + head * DK + i_C[:, None] * k_t + i_K[None, :]
    b_read = tl.load(p_read, mask=m_k, other=0.0)  # [C, BK]
    p_S = states + tile * (DK * DV) + i_K[:, None] * DV + i_V[None, :]
    b_S = tl.load(p_S, mask=mask_if(m_K[:, None] & m_V[None, :], left > 0), other=0.0)  # [BK, BV]
    b_o = tl.dot(b_read, b_S, input_precision="ieee")
    b_w = tl.load(w + i_o, mask=m_v, other=0.0)  # [C, BV]
    b_o = tl.dot(load_tile(scores_w, tile, left, C, REVERSE), b_w, b_o, input_precision="ieee")
    if HAS_X:
        b_x = tl.load(x + i_C[:, None] * x_t + i_V[None, :], mask=m_v, other=0.0)
        b_o = tl.dot(load_tile(scores_x, tile, left, C, REVERSE), b_x, b_o, input_precision="ieee")
    tl.store(o + i_o, b_o.to(o.dtype.element_ty), mask=(i_C[:, None] < length) & m_V[None, :])

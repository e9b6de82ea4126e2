# mypy: allow-untyped-defs
"""Gradients of q, k, beta and log_decay for a decay of its own for each row of the memory: all chunks at once.

As delta_gradient.py, with Y and X of delta_vector_pairs.py, which hold no decay. At level l (diag_levels.py) tokens
have one role each, f is what decays between them and the border, q' = f * q, k' = f * k, and Y and X count for pairs of
the level only. z holds k' of writers and q' of readers, and of

    r = f * (Y z),   s = f * (X k')
    reader   dq += r,   dk -= s,                c = q * r - k * s
    writer   dk += beta * (r - s),              c = k * beta * (r - s),      d beta_j += k_j . (r - s)_j
    d log a_t += sum of c_i over the tokens i whose f contains a_t

Readers and writers of one pair divide the decay between them at the border, so no term is added only to be taken away
again. The memory adds, as for scalar decays, what reads it before the chunk (R) and is written to the one after (W).
Without ``HAS_OUTPUT`` (delta_gradient.py) there are no Y, r and q'.

Letters: S chunks of all documents, H heads, C tokens in a chunk, DK and DV the dims of k and v, BK a block of DK, BV of
DV, NK blocks of K, L tokens of all rows.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.delta_gradient import (
    beta_gradient,
    clear_values,
    reads_of_memory,
    writes_to_memory,
)
from linear_moe.kernels.triton.diag_levels import halves, load_log_decay, sum_over
from linear_moe.kernels.triton.layout import segment_of


@triton.jit
def spread(table, level, x, dtype: tl.constexpr, LEVELS: tl.constexpr):
    """[C, BK]: for token t the sum of x over the tokens whose ``level_sums`` contain t."""
    high, low = halves(x, dtype)
    return sum_over(table, LEVELS + 2 + level, high, low)


@triton.jit
def of_levels(
    table, pairs, b_q, b_k, high, low, b_beta, b_dq, b_dk, b_log, b_dbeta,
    LEVELS: tl.constexpr, C: tl.constexpr, HAS_OUTPUT: tl.constexpr,
):  # fmt: skip
    """Adds to dq, dk and d log a [C, BK] and d beta [C] what tokens get of each other."""
    dtype: tl.constexpr = high.dtype
    i_C = tl.arange(0, C)
    i_pair = i_C[:, None] * C + i_C[None, :]
    nothing = tl.zeros([C, C], dtype)
    for level in range(0, LEVELS):
        factor = tl.exp2(sum_over(table, level, high, low))
        is_reader = ((i_C >> level) & 1)[:, None] == 1
        is_pair = tl.load(table + (2 * (LEVELS + 2) + level) * (C * C) + i_pair) > 0
        b_X = tl.where(is_pair, tl.load(pairs + C * C + i_pair), nothing)
        b_s = tl.dot(b_X, (b_k.to(tl.float32) * factor).to(dtype), input_precision="ieee") * factor
        if HAS_OUTPUT:
            b_Y = tl.where(is_pair, tl.load(pairs + i_pair), nothing)
            b_z = (tl.where(is_reader, b_q, b_k).to(tl.float32) * factor).to(dtype)
            b_r = tl.dot(b_Y, b_z, input_precision="ieee") * factor
            b_read = tl.where(is_reader, b_r, 0.0)
            b_dq += b_read
            b_write = tl.where(is_reader, 0.0, b_r - b_s)
            b_c = b_q.to(tl.float32) * b_read
        else:
            b_write = tl.where(is_reader, 0.0, -b_s)
            b_c = tl.zeros_like(b_s)
        b_dbeta += tl.sum(b_k.to(tl.float32) * b_write, 1)
        b_write = tl.where(is_reader, -b_s, b_write * b_beta[:, None])
        b_dk += b_write
        b_log += spread(table, level, b_c + b_k.to(tl.float32) * b_write, dtype, LEVELS)
    return b_dq, b_dk, b_log, b_dbeta


@triton.jit(do_not_specialize=["num_tokens", "chunks_per_row", "num_documents", "num_all", "b_b"])
def vector_gradient_kernel(
    q, k, do, beta, log_decay, table, totals, plan,
    pairs, own,  # delta_vector_pairs.py
    e, dv,  # [L, H, DV]
    states, d_states,  # [S, H, DK, DV]
    dq, dk, d_decay,  # [L, H, DK]
    d_beta,  # [NK, L, H] float32
    num_tokens, num_heads: tl.constexpr, chunks_per_row, num_documents, num_all, scale,
    q_b, q_t: tl.constexpr, q_h, k_b, k_t: tl.constexpr, k_h, o_b, o_t: tl.constexpr,
    o_h, b_b, b_t: tl.constexpr, b_h, a_b, a_t: tl.constexpr, a_h, a_d: tl.constexpr,
    K_PER: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, HAS_OUTPUT: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: S * H * NK."""
    NK: tl.constexpr = (DK + BK - 1) // BK
    i_k = tl.program_id(0) % NK
    head = (tl.program_id(0) // NK) % num_heads
    chunk = tl.program_id(0) // NK // num_heads
    row, start, length, left = segment_of(
        plan, chunk, num_tokens, C, chunks_per_row, num_documents, IS_PACKED
    )
    i_C, i_K = tl.arange(0, C), i_k * BK + tl.arange(0, BK)
    m_K = (i_K < DK) | (DK % BK == 0)
    batch, at, token = row.to(tl.int64), start.to(tl.int64), row * num_tokens + start
    g_t: tl.constexpr = num_heads * DK
    i_g = i_C[:, None] * g_t + i_K[None, :]
    of_g = token.to(tl.int64) * g_t + head * DK
    dq, dk, d_decay = dq + of_g, dk + of_g, d_decay + of_g
    p_dbeta = d_beta + ((i_k * tl.cast(num_all, tl.int64) + token) * num_heads + head) + i_C * num_heads
    m_g, m_token = (i_C[:, None] < length) & m_K[None, :], i_C < length
    if left > 0:
        place = chunk.to(tl.int64) * num_heads + head
        v_t: tl.constexpr = num_heads * DV
        of_v = token.to(tl.int64) * v_t + head * DV
        do += batch * o_b + at * o_t + head.to(tl.int64) * o_h
        e, of_dv = e + of_v, dv + of_v
        m_C = i_C < left
        m_q = m_C[:, None] & m_K[None, :]
        q += batch * q_b + at * q_t + (head // K_PER).to(tl.int64) * q_h
        k += batch * k_b + at * k_t + (head // K_PER).to(tl.int64) * k_h
        log_decay += batch * a_b + at * a_t + head.to(tl.int64) * a_h
        b_k = tl.load(k + i_C[:, None] * k_t + i_K[None, :], mask=m_q, other=0.0)  # [C, BK]
        b_q = b_k
        if HAS_OUTPUT:
            b_q = tl.load(q + i_C[:, None] * q_t + i_K[None, :], mask=m_q, other=0.0)
        p_beta = beta + batch * b_b + (at + i_C) * b_t + head.to(tl.int64) * b_h
        b_beta = tl.load(p_beta, mask=m_C, other=0.0).to(tl.float32)
        p_a = log_decay + i_C[:, None] * a_t + i_K[None, :] * a_d
        high, low = halves(load_log_decay(p_a, m_q), e.dtype.element_ty)

        tile = place * (DK * DV)
        b_oS, b_vS = reads_of_memory(
            do, of_dv, states + tile, o_t, v_t, left, i_K, m_K, DV, BK, BV, C, HAS_OUTPUT
        )
        read = tl.exp2(sum_over(table, LEVELS, high, low))
        b_dq = b_oS * read * scale
        b_dk = b_vS * -read
        b_R = b_k.to(tl.float32) * b_dk
        if HAS_OUTPUT:
            b_R += b_q.to(tl.float32) * b_dq
        b_log = spread(table, LEVELS, b_R, e.dtype.element_ty, LEVELS)
        b_eS, through = writes_to_memory(
            e, states + tile, d_states + tile, v_t, left, i_K, m_K, DV, BK, BV, C
        )
        b_W = b_eS * tl.exp2(sum_over(table, LEVELS + 1, high, low))
        b_dbeta = tl.sum(b_k.to(tl.float32) * b_W, 1)
        b_W = b_W * b_beta[:, None]
        b_dk += b_W
        b_log += spread(table, LEVELS + 1, b_k.to(tl.float32) * b_W, e.dtype.element_ty, LEVELS)
        total = tl.load(totals + place * DK + i_K, mask=m_K, other=0.0)
        b_log += (total * through)[None, :]

        pairs += place * (2 * C * C)
        if HAS_OUTPUT:
            b_own = tl.load(pairs + i_C * (C + 1)).to(tl.float32)  # scale do_i . e_i
            b_dbeta += b_own * tl.sum(b_q.to(tl.float32) * b_k.to(tl.float32), 1)
            b_dq += (b_own * b_beta)[:, None] * b_k.to(tl.float32)
            b_dk += (b_own * b_beta)[:, None] * b_q.to(tl.float32)
        b_dq, b_dk, b_log, b_dbeta = of_levels(
            table, pairs, b_q, b_k, high, low, b_beta, b_dq, b_dk, b_log, b_dbeta, LEVELS, C, HAS_OUTPUT
        )
        if HAS_OUTPUT:
            tl.store(dq + i_g, b_dq.to(dq.dtype.element_ty), mask=m_q)
        b_own = tl.load(own + place * C + i_C)
        tl.store(dk + i_g, b_dk.to(dk.dtype.element_ty), mask=m_q)
        tl.store(d_decay + i_g, b_log.to(d_decay.dtype.element_ty), mask=m_q)
        tl.store(p_dbeta, beta_gradient(b_dbeta, b_own, b_beta, i_k == 0), mask=m_C)
    else:  # after the last document; unused chunks have no tokens
        nothing = tl.zeros([C, BK], tl.float32)
        if HAS_OUTPUT:
            tl.store(dq + i_g, nothing.to(dq.dtype.element_ty), mask=m_g)
        tl.store(dk + i_g, nothing.to(dk.dtype.element_ty), mask=m_g)
        tl.store(d_decay + i_g, nothing.to(d_decay.dtype.element_ty), mask=m_g)
        tl.store(p_dbeta, tl.zeros([C], tl.float32), mask=m_token)
        clear_values(dv, token, head, num_heads, (i_k == 0) * length, DV, BV, C)

# mypy: allow-untyped-defs
"""Gradients of q, k, beta and log_decay for a decay of its own for each row of the memory: all chunks at once.

As delta_gradient.py, with Y and X of delta_vector_pairs.py, which hold no decay. At level l (diag_levels.py) tokens
have one role each, f is what decays between them and the border, and Y and X count for pairs of the level only. y and
x hold beta * f * k of writers, and of readers f * q and f * k, all rounded, and of

    r = Y y,   s = X x
    reader   dq += f * r,   dk -= f * s,        c = y * r - x * s
    writer   w += f * (r - s)                   c = x * s - y * r
    dk += beta * w,   d beta_j = k_j . w_j,     d log a_t = sum_{i >= t} c_i

A pair before or after t adds the same three rounded factors to that sum twice, with both signs: it is gone but for the
rounding of float32. What is written to the memory after the chunk (W) adds to w too, what reads the one before it (R)
to c; W to d log a apart, since the last tokens' writes have hardly decayed. Without ``HAS_OUTPUT`` (delta_gradient.py)
there are no Y, y and r.

Letters: S chunks of all documents, H heads, C tokens in a chunk, N = C / 16 (delta_near.py), DK and DV the dims of k
and v, BK a block of DK, BV of DV, NK blocks of K, L tokens of all rows.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.delta_gradient import (
    beta_gradient,
    clear_values,
    reads_of_memory,
    writes_to_memory,
)
from linear_moe.kernels.triton.delta_near import far_sums, near_sums, near_sums_of, of_blocks
from linear_moe.kernels.triton.diag_levels import halves, load_log_decay, sum_over
from linear_moe.kernels.triton.layout import segment_of


@triton.jit
def spread(table, level, x, dtype: tl.constexpr, LEVELS: tl.constexpr):
    """[C, BK]: for token t the sum of x over the tokens whose ``level_sums`` contain t."""
    high, low = halves(x, dtype)
    return sum_over(table, LEVELS + 2 + level, high, low)


@triton.jit
def rows_through(states, d_states, i_K, m_K, DV: tl.constexpr, BV: tl.constexpr):
    """S * dS summed over V, [BK]; loaded again, for the reason that sum_through of delta_gradient.py gives."""
    b_sum = tl.zeros([i_K.shape[0], BV], tl.float32)
    for block in range(0, (DV + BV - 1) // BV):
        i_V = block * BV + tl.arange(0, BV)
        i_S = i_K[:, None] * DV + i_V[None, :]
        m_S = m_K[:, None] & ((i_V < DV) | (DV % BV == 0))[None, :]
        b_S = tl.load(states + i_S, mask=m_S, other=0.0).to(tl.float32)
        b_sum += b_S * tl.load(d_states + i_S, mask=m_S, other=0.0).to(tl.float32)
    return tl.sum(b_sum, 1)


@triton.jit
def of_level(b_x, b_y, factor, b_X, b_Y, is_reader, b_dq, b_dk, b_w, b_log, HAS_OUTPUT: tl.constexpr):
    """Adds what tokens get of each other at one level; ``b_X`` and ``b_Y`` hold its pairs."""
    b_s = tl.dot(b_X, b_x, input_precision="ieee")
    b_c = b_x.to(tl.float32) * -b_s
    b_r = b_s * 0.0
    if HAS_OUTPUT:
        b_r = tl.dot(b_Y, b_y, input_precision="ieee")
        b_c += b_y.to(tl.float32) * b_r
        b_r *= factor
        b_dq += tl.where(is_reader, b_r, 0.0)
    b_log += tl.where(is_reader, b_c, -b_c)
    b_s *= factor
    b_dk -= tl.where(is_reader, b_s, 0.0)
    b_w += tl.where(is_reader, 0.0, b_r - b_s)
    return b_dq, b_dk, b_w, b_log


@triton.jit
def of_levels(
    table, pairs, b_q, b_k, b_beta, high, low, sums, b_dq, b_dk, b_w, b_log,
    LEVELS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, HAS_OUTPUT: tl.constexpr,
):  # fmt: skip
    """Adds to dq, dk, w and c, [N, 16, BK], what tokens get of each other; returns them as [C, BK]."""
    dtype: tl.constexpr = high.dtype
    n, i, i_C = tl.arange(0, C // 16), tl.arange(0, 16), tl.arange(0, C)
    i_near = n[:, None, None] * (16 * C + 16) + i[None, :, None] * C + i[None, None, :]
    for level in range(0, 4):
        factor = tl.exp2(near_sums(table, level, high, low, C))
        b_kb = b_k.to(tl.float32) * b_beta
        is_reader = (((i >> level) & 1) == 1)[None, :, None]
        is_level = (((i[:, None] ^ i[None, :]) >> level) == 1)[None]
        b_x = (tl.where(is_reader, b_k.to(tl.float32), b_kb) * factor).to(dtype)
        b_y = (tl.where(is_reader, b_q.to(tl.float32), b_kb) * factor).to(dtype)
        b_X = tl.where(is_level, tl.load(pairs + C * C + i_near), 0.0).to(dtype)
        b_Y = b_X
        if HAS_OUTPUT:
            b_Y = tl.where(is_level, tl.load(pairs + i_near), 0.0).to(dtype)
        b_dq, b_dk, b_w, b_log = of_level(
            b_x, b_y, factor, b_X, b_Y, is_reader, b_dq, b_dk, b_w, b_log, HAS_OUTPUT
        )
    b_dq, b_dk = tl.reshape(b_dq, (C, BK)), tl.reshape(b_dk, (C, BK))
    b_w, b_log = tl.reshape(b_w, (C, BK)), tl.reshape(b_log, (C, BK))
    b_q, b_k, b_beta = tl.reshape(b_q, (C, BK)), tl.reshape(b_k, (C, BK)), tl.reshape(b_beta, (C, 1))
    i_pair = i_C[:, None] * C + i_C[None, :]
    for level in range(4, LEVELS):
        b_sums = near_sums_of(table, level, high, low, C) + far_sums(sums, level, C)
        factor = tl.reshape(tl.exp2(b_sums), (C, BK))
        is_reader = (((i_C >> level) & 1) == 1)[:, None]
        is_level = ((i_C // 16)[:, None] ^ (i_C // 16)[None, :]) >> (level - 4) == 1
        b_kb = b_k.to(tl.float32) * b_beta
        for part in range(0, 1 + HAS_OUTPUT):  # X and k, then Y and q: two at once take more registers
            b_pair = tl.load(pairs + (1 - part) * (C * C) + i_pair, mask=is_level, other=0.0)
            b_own = tl.where(part == 0, b_k, b_q).to(tl.float32)
            b_z = (tl.where(is_reader, b_own, b_kb) * factor).to(dtype)
            b_r = tl.dot(b_pair, b_z, input_precision="ieee") * tl.where(part == 0, -1.0, 1.0)
            b_c = b_z.to(tl.float32) * b_r
            b_log += tl.where(is_reader, b_c, -b_c)
            b_r *= factor
            b_read = tl.where(is_reader, b_r, 0.0)
            b_dk += tl.where(part == 0, b_read, 0.0)
            b_dq += tl.where(part == 0, 0.0, b_read)
            b_w += tl.where(is_reader, 0.0, b_r)
    return b_dq, b_dk, b_w, b_log


@triton.jit(do_not_specialize=["num_tokens", "chunks_per_row", "num_documents", "num_all", "b_b"])
def delta_vector_gradient_kernel(
    q, k, do, beta, log_decay, table, weak, totals, plan,
    pairs, own,  # delta_vector_pairs.py
    e, dv,  # [L, H, DV]
    states, d_states,  # [S, H, DK, DV]
    dq, dk, d_decay,  # [L, H, DK]
    d_beta,  # [NK, L, H] float32
    num_tokens, num_heads: tl.constexpr, chunks_per_row, num_documents, num_all, scale,
    q_b, q_t: tl.constexpr, q_h, k_b, k_t: tl.constexpr, k_h, o_b, o_t: tl.constexpr,
    o_h, b_b, b_t: tl.constexpr, b_h, a_b, a_t: tl.constexpr, a_h, a_d: tl.constexpr,
    K_PER: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, HAS_WEAK: tl.constexpr, HAS_OUTPUT: tl.constexpr,
    IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: S * H * NK. Chunks that are ``weak`` are delta_weak.py's."""
    NK: tl.constexpr = (DK + BK - 1) // BK
    i_k = tl.program_id(0) % NK
    head = (tl.program_id(0) // NK) % num_heads
    chunk = tl.program_id(0) // NK // num_heads
    row, start, length, left = segment_of(
        plan, chunk, num_tokens, C, chunks_per_row, num_documents, IS_PACKED
    )
    is_here = left > 0
    if HAS_WEAK:
        length -= left  # those after the last document
        is_here = is_here & (tl.load(weak + tl.program_id(0) // NK) == 0)
    i_C, i_K = tl.arange(0, C), i_k * BK + tl.arange(0, BK)
    m_K = (i_K < DK) | (DK % BK == 0)
    batch, at, token = row.to(tl.int64), start.to(tl.int64), row * num_tokens + start
    g_t: tl.constexpr = num_heads * DK
    i_g = i_C[:, None] * g_t + i_K[None, :]
    of_g = token.to(tl.int64) * g_t + head * DK
    dq, dk, d_decay = dq + of_g, dk + of_g, d_decay + of_g
    p_dbeta = d_beta + ((i_k * tl.cast(num_all, tl.int64) + token) * num_heads + head) + i_C * num_heads
    m_g, m_token = (i_C[:, None] < length) & m_K[None, :], i_C < length
    if is_here:
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
        p_beta = beta + batch * b_b + (at + i_C) * b_t + head.to(tl.int64) * b_h
        b_beta = tl.load(p_beta, mask=m_C, other=0.0).to(tl.float32)
        N: tl.constexpr = C // 16
        near: tl.constexpr = (N, 16, BK)
        n = tl.arange(0, N)
        i_T = n[:, None, None] * 16 + tl.arange(0, 16)[None, :, None]
        i_near_K = i_K[None, None, :]
        m_near = (i_T < left) & m_K[None, None, :]
        b_k = tl.load(k + i_T * k_t + i_near_K, mask=m_near, other=0.0)  # [N, 16, BK]
        b_q = b_k
        if HAS_OUTPUT:
            b_q = tl.load(q + i_T * q_t + i_near_K, mask=m_near, other=0.0)
        b_a = load_log_decay(log_decay + i_T * a_t + i_near_K * a_d, m_near)
        high, low = halves(b_a, e.dtype.element_ty)
        near_beta = tl.reshape(b_beta, (N, 16))[:, :, None]
        up_to = near_sums(table, LEVELS, high, low, C)
        sums = tl.min(up_to, 1)  # [N, BK], of whole blocks: sums only fall

        # what tokens read of the memory before the chunk
        tile = place * (DK * DV)
        b_oS, b_vS = reads_of_memory(
            do, of_dv, states + tile, o_t, v_t, left, i_K, m_K, DV, BK, BV, C, HAS_OUTPUT
        )
        read = tl.exp2(up_to + of_blocks(sums, n[None, :] < n[:, None]))
        b_dq = tl.reshape(b_oS, near) * read * scale
        b_dk = tl.reshape(b_vS, near) * -read
        b_log = b_k.to(tl.float32) * b_dk
        b_w = tl.zeros_like(b_dk)
        pairs += place * (2 * C * C)
        if HAS_OUTPUT:
            b_log += b_q.to(tl.float32) * b_dq
            b_own = tl.load(pairs + i_C * (C + 1)).to(tl.float32)  # scale do_i . e_i
            b_own = tl.reshape(b_own, (N, 16))[:, :, None]
            b_dq += b_own * near_beta * b_k.to(tl.float32)
            b_w = b_own * b_q.to(tl.float32)

        # what they give each other
        b_dq, b_dk, b_w, b_log = of_levels(
            table, pairs, b_q, b_k, near_beta, high, low, sums, b_dq, b_dk, b_w, b_log,
            LEVELS, C, BK, HAS_OUTPUT,
        )  # fmt: skip
        if HAS_OUTPUT:
            tl.store(dq + i_g, b_dq.to(dq.dtype.element_ty), mask=m_q)
        b_log = spread(table, LEVELS, b_log, e.dtype.element_ty, LEVELS)

        # what they leave in the memory after it
        b_eS = writes_to_memory(e, d_states + tile, v_t, left, i_K, m_K, DV, BK, BV, C)
        later = near_sums(table, LEVELS + 1, high, low, C) + of_blocks(sums, n[None, :] > n[:, None])
        b_W = b_eS * tl.reshape(tl.exp2(later), (C, BK))
        b_w += b_W
        b_k2 = tl.reshape(b_k, (C, BK)).to(tl.float32)
        b_log += spread(table, LEVELS + 1, b_k2 * b_W * b_beta[:, None], e.dtype.element_ty, LEVELS)
        total = tl.load(totals + place * DK + i_K, mask=m_K, other=0.0)
        b_log += (total * rows_through(states + tile, d_states + tile, i_K, m_K, DV, BV))[None, :]
        tl.store(d_decay + i_g, b_log.to(d_decay.dtype.element_ty), mask=m_q)
        b_dk += b_w * b_beta[:, None]
        tl.store(dk + i_g, b_dk.to(dk.dtype.element_ty), mask=m_q)
        b_own = tl.load(own + place * C + i_C)
        tl.store(p_dbeta, beta_gradient(tl.sum(b_k2 * b_w, 1), b_own, b_beta, i_k == 0), mask=m_C)
    else:  # after the last document; unused chunks have no tokens
        nothing = tl.zeros([C, BK], tl.float32)
        if HAS_OUTPUT:
            tl.store(dq + i_g, nothing.to(dq.dtype.element_ty), mask=m_g)
        tl.store(dk + i_g, nothing.to(dk.dtype.element_ty), mask=m_g)
        tl.store(d_decay + i_g, nothing.to(d_decay.dtype.element_ty), mask=m_g)
        tl.store(p_dbeta, tl.zeros([C], tl.float32), mask=m_token)
        clear_values(dv, token, head, num_heads, (i_k == 0) * length, DV, BV, C)

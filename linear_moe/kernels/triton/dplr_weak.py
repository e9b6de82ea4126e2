# mypy: allow-untyped-defs
"""A diagonal plus low-rank memory inside a chunk whose decays are weak: one border for all pairs of its tokens.

    z^a_i = a_i 2^(e_i - G / 2)     z^q_i = q_i 2^(c_i - G / 2)     z^b_j = b_j 2^(G / 2 - c_j)     z^k_j as z^b
    A_ab = z^a (z^b)^T below the diagonal, A_qb = scale * z^q (z^b)^T on it too, the other two with z^k

e_t sums log2 of the decays of the tokens before t in its chunk, c_t also its own, G all of them: the decay between two
tokens is 2^(e_i - c_j) for a reader a, 2^(c_i - c_j) for a reader q. No exponent is above -G / 2, so that factors stay
in the range of the dtype, with the relative precision of levels. diag_levels.py has a border for each level: here the
scores need 6 products instead of 40, gradients 16 instead of 60. This holds where the chunk keeps ``LEAST`` of every
row of the memory, which the kernels look at: RWKV7's strongest decay, e^-0.61 for each token, leaves 2^-56, bfloat16
needs 2^-120. Other chunks are left to dplr_chunk.py and dplr_gradient.py, whose kernels leave these; float32 always
goes by levels. What a token writes and reads itself has no factor, and is summed in float32.

With all that a reader or writer gets, d z = d x / factor, the memory's part of it times 2^(G / 2),

    dz^a = Y_ab z^b + Y_ak z^k + 2^(G/2) z S^T           dz^b = Y_ab^T z^a + Y_qb^T z^q + 2^(G/2) w dS^T
    dz^q = Y_qb z^b + Y_qk z^k + 2^(G/2) scale do S^T    dz^k = Y_ak^T z^a + Y_qk^T z^q + 2^(G/2) v dS^T
    own_i = z^q dz^q - z^b dz^b - z^k dz^k
    d log a_t = sum of own_i over i >= t + sum of z^a dz^a over i > t
                + sum of what the memory gives z^b dz^b + z^k dz^k, over the chunk + total * <S, dS>

What is no part of it cancels, between terms that are no more than a chunk and that were not rounded but to two parts.

Letters: as in dplr_gradient.py.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.delta_chunk import unit_lower_inverse
from linear_moe.kernels.triton.delta_vector_gradient import spread
from linear_moe.kernels.triton.diag_levels import halves, load_log_decay, sum_over
from linear_moe.kernels.triton.diag_weak import keeps
from linear_moe.kernels.triton.dplr_gradient import load_values
from linear_moe.kernels.triton.layout import segment_of


@triton.jit(do_not_specialize=["num_tokens", "chunks_per_row", "num_documents"])
def dplr_solve_weak_kernel(
    q, k, a, b, log_decay,
    table,  # level_sums of diag_levels.py
    plan,
    inverse, scores_ak, scores_qb, scores_qk,  # [S, H, C, C]: T - I, A_ak, A_qb, A_qk
    q_read, a_read, b_write, k_write,  # [L, H, DK]
    totals,  # [S, H, DK] float32
    num_tokens, num_heads: tl.constexpr, chunks_per_row, num_documents, scale,
    q_r, q_t: tl.constexpr, q_h, k_r, k_t: tl.constexpr, k_h,
    a_r, a_t: tl.constexpr, a_h, b_r, b_t: tl.constexpr, b_h,
    g_r, g_t: tl.constexpr, g_h, g_d: tl.constexpr,
    K_PER: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    LEAST: tl.constexpr, PRECISION: tl.constexpr, HAS_OUTPUT: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: S * H. Totals of every chunk, the rest of those that keep enough."""
    dtype: tl.constexpr = inverse.dtype.element_ty
    head, chunk = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    row, start, _length, left = segment_of(
        plan, chunk, num_tokens, C, chunks_per_row, num_documents, IS_PACKED
    )
    if left > 0:
        i_C = tl.arange(0, C)
        batch, first, group = row.to(tl.int64), start.to(tl.int64), (head // K_PER).to(tl.int64)
        log_decay += batch * g_r + first * g_t + head.to(tl.int64) * g_h
        tile = chunk.to(tl.int64) * num_heads + head
        least = 0.0
        for block in range(0, (DK + BK - 1) // BK):
            i_K = block * BK + tl.arange(0, BK)
            mask = (i_C[:, None] < left) & ((i_K < DK) | (DK % BK == 0))[None, :]
            total = tl.sum(load_log_decay(log_decay + i_C[:, None] * g_t + i_K[None, :] * g_d, mask), 0)
            tl.store(totals + tile * DK + i_K, tl.exp2(total), mask=i_K < DK)
            least = tl.minimum(least, tl.min(total, 0))
        if tl.exp2(least) >= LEAST:
            q += batch * q_r + first * q_t + group * q_h
            k += batch * k_r + first * k_t + group * k_h
            a += batch * a_r + first * a_t + group * a_h
            b += batch * b_r + first * b_t + group * b_h
            of_chunk = ((batch * num_tokens + first) * num_heads + head) * DK
            b_ab = tl.zeros([C, C], tl.float32)
            b_ak = tl.zeros([C, C], tl.float32)
            b_qb = tl.zeros([C, C], tl.float32)
            b_qk = tl.zeros([C, C], tl.float32)
            own_b = tl.zeros([C, BK], tl.float32)
            own_k = tl.zeros([C, BK], tl.float32)
            for block in range(0, (DK + BK - 1) // BK):
                i_K = block * BK + tl.arange(0, BK)
                mask = (i_C[:, None] < left) & ((i_K < DK) | (DK % BK == 0))[None, :]
                i_x = of_chunk + i_C[:, None] * (num_heads * DK) + i_K[None, :]
                b_g = load_log_decay(log_decay + i_C[:, None] * g_t + i_K[None, :] * g_d, mask)  # [C, BK]
                high, low = halves(b_g, dtype)
                border = tl.sum(b_g, 0)[None, :] * 0.5
                b_e = sum_over(table, LEVELS, high, low) - border
                b_c = b_e + b_g
                border = tl.exp2(border)
                factor = tl.exp2(-b_c)
                z_b = tl.load(b + i_C[:, None] * b_t + i_K[None, :], mask=mask, other=0.0).to(tl.float32)
                z_b *= factor
                tl.store(b_write + i_x, (z_b * border).to(dtype), mask=mask)
                z_k = tl.load(k + i_C[:, None] * k_t + i_K[None, :], mask=mask, other=0.0).to(tl.float32)
                z_k *= factor
                tl.store(k_write + i_x, (z_k * border).to(dtype), mask=mask)
                if HAS_OUTPUT:
                    z_q = tl.load(q + i_C[:, None] * q_t + i_K[None, :], mask=mask, other=0.0).to(tl.float32)
                    z_q *= tl.exp2(b_c)
                    tl.store(q_read + i_x, (z_q * (border * scale)).to(dtype), mask=mask)
                    own_b += z_q * z_b
                    own_k += z_q * z_k
                z_b, z_k = z_b.to(dtype), z_k.to(dtype)
                z_a = tl.load(a + i_C[:, None] * a_t + i_K[None, :], mask=mask, other=0.0).to(tl.float32)
                z_a *= tl.exp2(b_e)
                tl.store(a_read + i_x, (z_a * border).to(dtype), mask=mask)
                z_a = z_a.to(dtype)
                b_ab = tl.dot(z_a, tl.trans(z_b), b_ab, input_precision="ieee")
                b_ak = tl.dot(z_a, tl.trans(z_k), b_ak, input_precision="ieee")
                if HAS_OUTPUT:
                    z_q = z_q.to(dtype)
                    b_qb = tl.dot(z_q, tl.trans(z_b), b_qb, input_precision="ieee")
                    b_qk = tl.dot(z_q, tl.trans(z_k), b_qk, input_precision="ieee")
            i_tile = tile * (C * C) + i_C[:, None] * C + i_C[None, :]
            is_below = i_C[:, None] > i_C[None, :]
            if HAS_OUTPUT:
                is_own = i_C[:, None] == i_C[None, :]
                b_qb = tl.where(is_below, b_qb, tl.where(is_own, tl.sum(own_b, 1)[:, None], 0.0))
                tl.store(scores_qb + i_tile, (b_qb * scale).to(dtype))
                b_qk = tl.where(is_below, b_qk, tl.where(is_own, tl.sum(own_k, 1)[:, None], 0.0))
                tl.store(scores_qk + i_tile, (b_qk * scale).to(dtype))
            tl.store(scores_ak + i_tile, tl.where(is_below, b_ak, 0.0).to(dtype))
            b_T = unit_lower_inverse(tl.where(is_below, -b_ab, 0.0), C, PRECISION)
            tl.store(inverse + i_tile, tl.where(is_below, b_T, 0.0).to(dtype))


@triton.jit
def times_memory(
    x, y, memory, x_t: tl.constexpr, y_t: tl.constexpr, left, i_K, m_K,
    DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, HAS_Y: tl.constexpr,
):  # fmt: skip
    """x S^T and y S^T, [C, BK], of tokens' vectors x and y [C, DV]; without y zeros."""
    b_x = tl.zeros([C, BK], tl.float32)
    b_y = tl.zeros([C, BK], tl.float32)
    for block in range(0, (DV + BV - 1) // BV):
        i_V = block * BV + tl.arange(0, BV)
        m_S = ((i_V < DV) | (DV % BV == 0))[:, None] & m_K[None, :]
        b_ST = tl.load(memory + i_K[None, :] * DV + i_V[:, None], mask=m_S, other=0.0)  # [BV, BK]
        b_x = tl.dot(load_values(x, x_t, i_V, left, DV, BV, C), b_ST, b_x, input_precision="ieee")
        if HAS_Y:
            b_y = tl.dot(load_values(y, y_t, i_V, left, DV, BV, C), b_ST, b_y, input_precision="ieee")
    return b_x, b_y


@triton.jit
def product_of_memories(
    states, d_states, i_K, m_K, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr
):  # fmt: skip
    """S * dS summed over V, [BK]."""
    through = tl.zeros([BK], tl.float32)
    for block in range(0, (DV + BV - 1) // BV):
        i_V = block * BV + tl.arange(0, BV)
        i_S = i_K[:, None] * DV + i_V[None, :]
        m_S = m_K[:, None] & ((i_V < DV) | (DV % BV == 0))[None, :]
        b_S = tl.load(states + i_S, mask=m_S, other=0.0).to(tl.float32)  # [BK, BV]
        through += tl.sum(b_S * tl.load(d_states + i_S, mask=m_S, other=0.0).to(tl.float32), 1)
    return through


@triton.jit
def load_pairs(pairs, number: tl.constexpr, C: tl.constexpr):
    """[C, C]: one of the four Y, zeros above the diagonal."""
    return tl.load(pairs + (number * C + tl.arange(0, C)[:, None]) * C + tl.arange(0, C)[None, :])


@triton.jit(do_not_specialize=["num_tokens", "chunks_per_row", "num_documents"])
def dplr_gradient_weak_kernel(
    q, k, a, b, log_decay, table, totals, plan,
    v, do,
    w, z,  # [L, H, DV]
    states, d_states,  # [S, H, DK, DV]
    pairs,  # [S, H, 4, C, C]
    dq, dk, da, db, d_decay,  # [L, H, DK]
    num_tokens, num_heads: tl.constexpr, chunks_per_row, num_documents, scale,
    q_r, q_t: tl.constexpr, q_h, k_r, k_t: tl.constexpr, k_h,
    a_r, a_t: tl.constexpr, a_h, b_r, b_t: tl.constexpr, b_h,
    g_r, g_t: tl.constexpr, g_h, g_d: tl.constexpr, v_r, v_t: tl.constexpr, v_h,
    o_r, o_t: tl.constexpr, o_h,
    K_PER: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, LEAST: tl.constexpr, HAS_OUTPUT: tl.constexpr,
    HAS_V: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: S * H * NK. Chunks that keep enough; the others, and tokens after the last document, are left."""
    dtype: tl.constexpr = w.dtype.element_ty
    NK: tl.constexpr = (DK + BK - 1) // BK
    head = (tl.program_id(0) // NK) % num_heads
    chunk = tl.program_id(0) // NK // num_heads
    row, start, _length, left = segment_of(
        plan, chunk, num_tokens, C, chunks_per_row, num_documents, IS_PACKED
    )
    place = chunk.to(tl.int64) * num_heads + head
    if (left > 0) & keeps(totals, place, LEAST, DK):
        i_C, i_K = tl.arange(0, C), (tl.program_id(0) % NK) * BK + tl.arange(0, BK)
        m_K = (i_K < DK) | (DK % BK == 0)
        mask = (i_C[:, None] < left) & m_K[None, :]
        batch, at = row.to(tl.int64), start.to(tl.int64)
        token = batch * num_tokens + at
        of_head, of_group = head.to(tl.int64), (head // K_PER).to(tl.int64)
        d_t: tl.constexpr = num_heads * DK
        w_t: tl.constexpr = num_heads * DV
        i_d = token * d_t + head * DK + i_C[:, None] * d_t + i_K[None, :]
        k += batch * k_r + at * k_t + of_group * k_h
        a += batch * a_r + at * a_t + of_group * a_h
        b += batch * b_r + at * b_t + of_group * b_h
        log_decay += batch * g_r + at * g_t + of_head * g_h
        w, z = w + token * w_t + head * DV, z + token * w_t + head * DV
        v += batch * v_r + at * v_t + of_head * v_h
        do += batch * o_r + at * o_t + of_head * o_h
        states, d_states = states + place * (DK * DV), d_states + place * (DK * DV)
        pairs += place * (4 * C * C)

        b_g = load_log_decay(log_decay + i_C[:, None] * g_t + i_K[None, :] * g_d, mask)  # [C, BK]
        border = tl.sum(b_g, 0)[None, :] * 0.5
        high, low = halves(b_g, dtype)
        b_e = sum_over(table, LEVELS, high, low) - border
        b_c = b_e + b_g
        border = tl.exp2(border)
        factor = tl.exp2(-b_c)
        z_b = tl.load(b + i_C[:, None] * b_t + i_K[None, :], mask=mask, other=0.0).to(tl.float32)
        z_b = (z_b * factor).to(dtype)
        z_k = z_b
        if HAS_V:
            z_k = tl.load(k + i_C[:, None] * k_t + i_K[None, :], mask=mask, other=0.0).to(tl.float32)
            z_k = (z_k * factor).to(dtype)

        # readers
        b_da, b_dq = times_memory(z, do, states, w_t, o_t, left, i_K, m_K, DV, BK, BV, C, HAS_OUTPUT)
        factor = tl.exp2(b_e)
        z_a = tl.load(a + i_C[:, None] * a_t + i_K[None, :], mask=mask, other=0.0).to(tl.float32)
        z_a = (z_a * factor).to(dtype)
        b_ab = load_pairs(pairs, 0, C)
        b_da = tl.dot(b_ab, z_b, b_da * border, input_precision="ieee")
        b_ak = b_ab
        if HAS_V:
            b_ak = load_pairs(pairs, 1, C)
            b_da = tl.dot(b_ak, z_k, b_da, input_precision="ieee")
        b_log = z_a.to(tl.float32) * b_da
        tl.store(da + i_d, (b_da * factor).to(da.dtype.element_ty), mask=mask)
        b_own = tl.zeros([C, BK], tl.float32)
        z_q, b_qb, b_qk = z_a, b_ab, b_ab
        if HAS_OUTPUT:
            q += batch * q_r + at * q_t + of_group * q_h
            factor = tl.exp2(b_c)
            z_q = tl.load(q + i_C[:, None] * q_t + i_K[None, :], mask=mask, other=0.0).to(tl.float32)
            z_q = (z_q * factor).to(dtype)
            b_qb = load_pairs(pairs, 2, C)
            b_dq = tl.dot(b_qb, z_b, b_dq * (border * scale), input_precision="ieee")
            if HAS_V:
                b_qk = load_pairs(pairs, 3, C)
                b_dq = tl.dot(b_qk, z_k, b_dq, input_precision="ieee")
            b_own = z_q.to(tl.float32) * b_dq
            tl.store(dq + i_d, (b_dq * factor).to(dq.dtype.element_ty), mask=mask)

        # writers
        b_db, b_dk = times_memory(w, v, d_states, w_t, v_t, left, i_K, m_K, DV, BK, BV, C, HAS_V)
        factor = tl.exp2(-b_c)
        b_db *= border
        passes = tl.sum(b_db * z_b.to(tl.float32), 0)
        b_db = tl.dot(tl.trans(b_ab), z_a, b_db, input_precision="ieee")
        if HAS_OUTPUT:
            b_db = tl.dot(tl.trans(b_qb), z_q, b_db, input_precision="ieee")
        b_own -= z_b.to(tl.float32) * b_db
        tl.store(db + i_d, (b_db * factor).to(db.dtype.element_ty), mask=mask)
        if HAS_V:
            b_dk *= border
            passes += tl.sum(b_dk * z_k.to(tl.float32), 0)
            b_dk = tl.dot(tl.trans(b_ak), z_a, b_dk, input_precision="ieee")
            if HAS_OUTPUT:
                b_dk = tl.dot(tl.trans(b_qk), z_q, b_dk, input_precision="ieee")
            b_own -= z_k.to(tl.float32) * b_dk
            tl.store(dk + i_d, (b_dk * factor).to(dk.dtype.element_ty), mask=mask)

        through = product_of_memories(states, d_states, i_K, m_K, DV, BK, BV)
        passes += through * tl.load(totals + place * DK + i_K, mask=m_K, other=0.0)
        b_log = spread(table, LEVELS, b_log + b_own, dtype, LEVELS) + b_own + passes[None, :]
        tl.store(d_decay + i_d, b_log.to(d_decay.dtype.element_ty), mask=mask)

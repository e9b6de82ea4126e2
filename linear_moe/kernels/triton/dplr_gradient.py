# mypy: allow-untyped-defs
"""Gradients of q, k, a, b and log_decay of a diagonal plus low-rank memory: all chunks at once, from its two scans.

With S before the chunk, dS the gradient of the memory after it, w what tokens found under a, z its gradient, own_i the
decay of token i and f what decays between a token and the border of its level (diag_levels.py), the pairs of a level
give

    y_ab = z w^T,  y_ak = z v^T,  y_qb = scale * do w^T,  y_qk = scale * do v^T          without any decay
    reader   da += f * (y_ab (f * b) + y_ak (f * k))              dq += own * f * (y_qb (f * b) + y_qk (f * k))
    writer   db += f * (y_ab^T (f * a) + y_qb^T (own * f * q))    dk += f * (y_ak^T (f * a) + y_qk^T (own * f * q))

the memory the same with f = read and z S^T, scale * do S^T, or f = write and w dS^T, v dS^T; a token and itself q and
b, q and k without f. All that a factor multiplies is counted once for each log decay in it:

    d log a_t += sum of c_i over the tokens i whose f contains a_t,   c = a * da + q * dq + b * db + k * dk of that f
    d log a_t += q_t * dq_t (all of it that has own_t) + total * <S, dS>

Without ``HAS_OUTPUT`` nothing read the memory but its end: no q and do. Without ``HAS_V`` nothing was written.

Letters: S chunks of all documents, H heads, C tokens in a chunk, DK and DV the dims of k and v, BK a block of DK, BV of
DV, NK blocks of K, L tokens of all rows. docs/kernels_dplr.md derives the formulas.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.delta_vector_gradient import spread
from linear_moe.kernels.triton.diag_levels import halves, load_log_decay, sum_over
from linear_moe.kernels.triton.diag_weak import keeps
from linear_moe.kernels.triton.layout import segment_of


@triton.jit
def load_values(x, x_t: tl.constexpr, i_V, left, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr):
    """[C, BV] of v, do, w or z of a chunk."""
    i_C = tl.arange(0, C)
    mask = (i_C[:, None] < left) & ((i_V < DV) | (DV % BV == 0))[None, :]
    return tl.load(x + i_C[:, None] * x_t + i_V[None, :], mask=mask, other=0.0)


@triton.jit
def products_with_memories(
    v, do, w, z, states, d_states, v_t: tl.constexpr, o_t: tl.constexpr, w_t: tl.constexpr, left, i_K, m_K,
    DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    HAS_OUTPUT: tl.constexpr, HAS_V: tl.constexpr,
):  # fmt: skip
    """do S^T, z S^T, w dS^T, v dS^T, [C, BK], zeros for what there is not; S * dS summed over V, [BK]."""
    b_oS = tl.zeros([C, BK], tl.float32)
    b_zS = tl.zeros([C, BK], tl.float32)
    b_wD = tl.zeros([C, BK], tl.float32)
    b_vD = tl.zeros([C, BK], tl.float32)
    through = tl.zeros([BK], tl.float32)
    for block in range(0, (DV + BV - 1) // BV):
        i_V = block * BV + tl.arange(0, BV)
        m_V = (i_V < DV) | (DV % BV == 0)
        i_ST, m_ST = i_K[None, :] * DV + i_V[:, None], m_V[:, None] & m_K[None, :]
        b_ST = tl.load(states + i_ST, mask=m_ST, other=0.0)  # [BV, BK]
        b_zS = tl.dot(load_values(z, w_t, i_V, left, DV, BV, C), b_ST, b_zS, input_precision="ieee")
        if HAS_OUTPUT:
            b_oS = tl.dot(load_values(do, o_t, i_V, left, DV, BV, C), b_ST, b_oS, input_precision="ieee")
        b_DT = tl.load(d_states + i_ST, mask=m_ST, other=0.0)
        b_wD = tl.dot(load_values(w, w_t, i_V, left, DV, BV, C), b_DT, b_wD, input_precision="ieee")
        if HAS_V:
            b_vD = tl.dot(load_values(v, v_t, i_V, left, DV, BV, C), b_DT, b_vD, input_precision="ieee")
        # loaded again: Triton fetches the next block over a tile that registers and a product share (delta_gradient.py)
        i_S, m_S = i_K[:, None] * DV + i_V[None, :], m_K[:, None] & m_V[None, :]
        b_S = tl.load(states + i_S, mask=m_S, other=0.0).to(tl.float32)  # [BK, BV]
        through += tl.sum(b_S * tl.load(d_states + i_S, mask=m_S, other=0.0).to(tl.float32), 1)
    return b_oS, b_zS, b_wD, b_vD, through


@triton.jit
def add_pairs(total, x, y, HAS_BOTH: tl.constexpr):
    """total + x y^T; ``HAS_BOTH``: its transpose above the diagonal, a product of its own, none is transposed."""
    if not HAS_BOTH:
        return tl.dot(x, tl.trans(y), total, input_precision="ieee")
    i_C = tl.arange(0, total.shape[0])
    below = tl.dot(x, tl.trans(y), input_precision="ieee")
    above = tl.dot(y, tl.trans(x), input_precision="ieee")
    return total + tl.where(i_C[:, None] >= i_C[None, :], below, above)


@triton.jit
def pairs_of_reader(
    p_pairs, x, w, v, x_t: tl.constexpr, w_t: tl.constexpr, v_t: tl.constexpr, scale, left,
    DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, HAS_V: tl.constexpr, HAS_BOTH: tl.constexpr,
    HAS_OWN: tl.constexpr,
):  # fmt: skip
    """Stores scale * x w^T and scale * x v^T: one after the other reader, for registers.

    Each in both orders, or only where it reads, ``HAS_OWN`` on the diagonal too.
    """
    dtype: tl.constexpr = p_pairs.dtype.element_ty
    y_b = tl.zeros([C, C], tl.float32)
    y_k = tl.zeros([C, C], tl.float32)
    for block in range(0, (DV + BV - 1) // BV):
        i_V = block * BV + tl.arange(0, BV)
        b_x = load_values(x, x_t, i_V, left, DV, BV, C)
        y_b = add_pairs(y_b, b_x, load_values(w, w_t, i_V, left, DV, BV, C), HAS_BOTH)
        if HAS_V:
            y_k = add_pairs(y_k, b_x, load_values(v, v_t, i_V, left, DV, BV, C), HAS_BOTH)
    if not HAS_BOTH:
        i = tl.arange(0, C)
        is_read = (i[:, None] >= i[None, :]) if HAS_OWN else (i[:, None] > i[None, :])
        y_b, y_k = tl.where(is_read, y_b, 0.0), tl.where(is_read, y_k, 0.0)
    tl.store(p_pairs, (y_b * scale).to(dtype))
    if HAS_V:
        tl.store(p_pairs + C * C, (y_k * scale).to(dtype))


@triton.jit(do_not_specialize=["num_tokens", "chunks_per_row", "num_documents"])
def dplr_pairs_kernel(
    v, do,
    w, z,  # [L, H, DV]
    totals, plan,
    pairs,  # [S, H, 4, C, C]: y_ab, y_ak, y_qb, y_qk
    num_tokens, num_heads: tl.constexpr, chunks_per_row, num_documents, scale,
    v_r, v_t: tl.constexpr, v_h, o_r, o_t: tl.constexpr, o_h,
    DK: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, LEAST: tl.constexpr,
    HAS_OUTPUT: tl.constexpr, HAS_V: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: S * H. In both orders for levels, one for dplr_weak.py."""
    head, chunk = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    row, start, _length, left = segment_of(
        plan, chunk, num_tokens, C, chunks_per_row, num_documents, IS_PACKED
    )
    if left > 0:
        i_C = tl.arange(0, C)
        batch, at = row.to(tl.int64), start.to(tl.int64)
        w_t: tl.constexpr = num_heads * DV
        of_w = (batch * num_tokens + at) * w_t + head * DV
        w, z = w + of_w, z + of_w
        v += batch * v_r + at * v_t + head.to(tl.int64) * v_h
        do += batch * o_r + at * o_t + head.to(tl.int64) * o_h
        place = chunk.to(tl.int64) * num_heads + head
        p_pairs = pairs + place * (4 * C * C) + i_C[:, None] * C + i_C[None, :]
        if LEAST < 1 and keeps(totals, place, LEAST, DK):
            pairs_of_reader(p_pairs, z, w, v, w_t, w_t, v_t, 1.0, left, DV, BV, C, HAS_V, False, False)
            if HAS_OUTPUT:
                p_pairs += 2 * C * C
                pairs_of_reader(p_pairs, do, w, v, o_t, w_t, v_t, scale, left, DV, BV, C, HAS_V, False, True)
        else:
            pairs_of_reader(p_pairs, z, w, v, w_t, w_t, v_t, 1.0, left, DV, BV, C, HAS_V, True, False)
            if HAS_OUTPUT:
                p_pairs += 2 * C * C
                pairs_of_reader(p_pairs, do, w, v, o_t, w_t, v_t, scale, left, DV, BV, C, HAS_V, True, True)


@triton.jit
def of_level(pairs, number, level, x, y, factor, C: tl.constexpr):
    """[C, BK]: what the readers x and the writers y of one of the four get of each other at a level.

    Only eights of pairs that have some of the level are loaded, 16 bytes at a time; a load that did not depend on the
    level would move out of its loop, and all four be in registers.
    """
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    is_reader = ((i >> level) & 1) == 1
    is_near = (((i >> 3) ^ (j >> 3)) >> tl.maximum(level - 3, 0)) == tl.where(level < 3, 0, 1)
    b_y = tl.load(pairs + (number * C + i) * C + j, mask=tl.max_constancy(is_near, [1, 8]), other=0.0)
    b_y = tl.where(((i ^ j) >> level) == 1, b_y, tl.zeros_like(b_y))
    z = (tl.where(is_reader, x, y) * factor).to(b_y.dtype)
    return tl.dot(b_y, z, input_precision="ieee")


@triton.jit
def of_pairs(
    table, pairs, b_q, b_k, b_a, b_b, own, high, low, b_dq, b_dk, b_da, b_db, b_log,
    LEVELS: tl.constexpr, C: tl.constexpr, HAS_OUTPUT: tl.constexpr, HAS_V: tl.constexpr,
):  # fmt: skip
    """Adds what readers (a, q) and writers (b, k) of every level get, [C, BK]."""
    dtype: tl.constexpr = high.dtype
    b_oq = b_q * own
    for level in range(0, LEVELS):
        factor = tl.exp2(sum_over(table, level, high, low))
        is_reader = ((tl.arange(0, C) >> level) & 1)[:, None] == 1
        of_a = of_level(pairs, 0, level, b_a, b_b, factor, C)
        of_b = of_a
        if HAS_V:
            of_k = of_level(pairs, 1, level, b_a, b_k, factor, C)
            of_a += of_k
        if HAS_OUTPUT:
            of_q = of_level(pairs, 2, level, b_oq, b_b, factor, C)
            of_b += of_q
            if HAS_V:
                of_qk = of_level(pairs, 3, level, b_oq, b_k, factor, C)
                of_q += of_qk
                of_k += of_qk
        of_a, of_b = tl.where(is_reader, of_a * factor, 0.0), tl.where(is_reader, 0.0, of_b * factor)
        b_da += of_a
        b_db += of_b
        b_c = b_a * of_a + b_b * of_b
        if HAS_V:
            of_k = tl.where(is_reader, 0.0, of_k * factor)
            b_dk += of_k
            b_c += b_k * of_k
        if HAS_OUTPUT:
            of_q = tl.where(is_reader, of_q * (factor * own), 0.0)
            b_dq += of_q
            b_c += b_q * of_q
        b_log += spread(table, level, b_c, dtype, LEVELS)
    return b_dq, b_dk, b_da, b_db, b_log


@triton.jit(do_not_specialize=["num_tokens", "chunks_per_row", "num_documents"])
def dplr_gradient_kernel(
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
    """Grid: S * H * NK. Tokens after the last document get zeros; chunks that keep ``LEAST`` are dplr_weak.py's."""
    dtype: tl.constexpr = w.dtype.element_ty
    NK: tl.constexpr = (DK + BK - 1) // BK
    i_k = tl.program_id(0) % NK
    head = (tl.program_id(0) // NK) % num_heads
    chunk = tl.program_id(0) // NK // num_heads
    row, start, length, left = segment_of(
        plan, chunk, num_tokens, C, chunks_per_row, num_documents, IS_PACKED
    )
    place = chunk.to(tl.int64) * num_heads + head
    if LEAST < 1 and (left > 0) & keeps(totals, place, LEAST, DK):
        return
    i_C, i_K = tl.arange(0, C), i_k * BK + tl.arange(0, BK)
    m_K = (i_K < DK) | (DK % BK == 0)
    batch, at = row.to(tl.int64), start.to(tl.int64)
    token = batch * num_tokens + at
    d_t: tl.constexpr = num_heads * DK
    w_t: tl.constexpr = num_heads * DV
    i_d = token * d_t + head * DK + i_C[:, None] * d_t + i_K[None, :]
    m_d = (i_C[:, None] < length) & m_K[None, :]  # also where no document is
    b_dq = tl.zeros([C, BK], tl.float32)
    b_dk = tl.zeros([C, BK], tl.float32)
    b_da = tl.zeros([C, BK], tl.float32)
    b_db = tl.zeros([C, BK], tl.float32)
    b_log = tl.zeros([C, BK], tl.float32)
    if left > 0:
        of_head, of_group = head.to(tl.int64), (head // K_PER).to(tl.int64)
        mask = (i_C[:, None] < left) & m_K[None, :]
        k += batch * k_r + at * k_t + of_group * k_h
        a += batch * a_r + at * a_t + of_group * a_h
        b += batch * b_r + at * b_t + of_group * b_h
        log_decay += batch * g_r + at * g_t + of_head * g_h
        w, z = w + token * w_t + head * DV, z + token * w_t + head * DV
        v += batch * v_r + at * v_t + of_head * v_h
        do += batch * o_r + at * o_t + of_head * o_h
        b_k = tl.load(k + i_C[:, None] * k_t + i_K[None, :], mask=mask, other=0.0).to(tl.float32)  # [C, BK]
        b_a = tl.load(a + i_C[:, None] * a_t + i_K[None, :], mask=mask, other=0.0).to(tl.float32)
        b_b = tl.load(b + i_C[:, None] * b_t + i_K[None, :], mask=mask, other=0.0).to(tl.float32)
        b_g = load_log_decay(log_decay + i_C[:, None] * g_t + i_K[None, :] * g_d, mask)
        own = tl.exp2(b_g)
        high, low = halves(b_g, dtype)
        b_q = b_k
        if HAS_OUTPUT:
            q += batch * q_r + at * q_t + of_group * q_h
            b_q = tl.load(q + i_C[:, None] * q_t + i_K[None, :], mask=mask, other=0.0).to(tl.float32)

        b_oS, b_zS, b_wD, b_vD, through = products_with_memories(
            v, do, w, z, states + place * (DK * DV), d_states + place * (DK * DV), v_t, o_t, w_t, left,
            i_K, m_K, DV, BK, BV, C, HAS_OUTPUT, HAS_V,
        )  # fmt: skip
        read = tl.exp2(sum_over(table, LEVELS, high, low))
        b_da = b_zS * read
        b_R = b_a * b_da
        if HAS_OUTPUT:
            b_dq = b_oS * (read * own * scale)
            b_R += b_q * b_dq
        b_log = spread(table, LEVELS, b_R, dtype, LEVELS)
        write = tl.exp2(sum_over(table, LEVELS + 1, high, low))
        b_db, b_dk = b_wD * write, b_vD * write
        b_log += spread(table, LEVELS + 1, b_b * b_db + b_k * b_dk, dtype, LEVELS)
        total = tl.load(totals + place * DK + i_K, mask=m_K, other=0.0)
        b_log += (total * through)[None, :]

        pairs += place * (4 * C * C)
        b_dq, b_dk, b_da, b_db, b_log = of_pairs(
            table, pairs, b_q, b_k, b_a, b_b, own, high, low, b_dq, b_dk, b_da, b_db, b_log,
            LEVELS, C, HAS_OUTPUT, HAS_V,
        )  # fmt: skip
        if HAS_OUTPUT:
            b_log += b_q * b_dq  # all that has own
            # a token and itself
            own_qb = tl.load(pairs + 2 * C * C + i_C * (C + 1)).to(tl.float32)[:, None]
            b_dq += own_qb * b_b
            b_db += own_qb * b_q
            if HAS_V:
                own_qk = tl.load(pairs + 3 * C * C + i_C * (C + 1)).to(tl.float32)[:, None]
                b_dq += own_qk * b_k
                b_dk += own_qk * b_q
    if HAS_OUTPUT:
        tl.store(dq + i_d, b_dq.to(dq.dtype.element_ty), mask=m_d)
    if HAS_V:
        tl.store(dk + i_d, b_dk.to(dk.dtype.element_ty), mask=m_d)
    tl.store(da + i_d, b_da.to(da.dtype.element_ty), mask=m_d)
    tl.store(db + i_d, b_db.to(db.dtype.element_ty), mask=m_d)
    tl.store(d_decay + i_d, b_log.to(d_decay.dtype.element_ty), mask=m_d)

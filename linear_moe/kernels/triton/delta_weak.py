# mypy: allow-untyped-defs
"""The delta rule with a decay for each row inside a chunk whose decays are weak: a border for each half of its tokens.

With c_t the sum of log2 of the decays of a token's half of the chunk up to it and G that of the whole half,

    up_t = 2^(c_t - G / 2)     z^q = q up     z^k = k up     z^w = k / up     between = 2^((G_1 + G_2) / 2)

and what decays between a writer j and a reader i is up_i / up_j in one half, between * up_i / up_j where the halves
differ. No exponent is above -G / 2, so that factors stay in the range of the dtype, with the relative precision of
levels (delta_levels.py), which need a border for each of log2 C: here pairs are two products instead of six. This holds
where each half keeps 2^LEAST of every row of the memory, which the solver looks at and leaves in ``weak``; other chunks
are left to delta_levels.py and delta_vector_gradient.py, whose kernels leave these. float32 always goes by levels.

With beta in z^w, X and Y of delta_vector_pairs.py on and below the diagonal, and b_i = 1 for readers in the first half,
``between`` for those in the second, what tokens get times up (readers) or over it (writers) is

    d^q_i = b_i (Y z^w of the first half + 2^(G_1 / 2) scale do S^T)_i + (Y z^w of the second)_i
    d^k_i = -b_i (X z^w of the first half + 2^(G_1 / 2) dv S^T)_i - (X z^w of the second)_i
    d^w_j = b'_j (Y^T z^q - X^T z^k of the second half + 2^(G_2 / 2) e dS^T)_j + (Y^T z^q - X^T z^k of the first)_j
    own_i = z^q d^q + z^k d^k - z^w d^w
    d log a_t = sum of own_i over i >= t + what the memory gives z^w d^w, of the whole chunk + total * <S, dS>

where b' is ``between`` for writers in the first half. What is no part of d log a_t cancels, between terms that are no
more than a chunk and that were not rounded but to two parts.

Letters: as in delta_levels.py and delta_vector_gradient.py.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.delta_chunk import unit_lower_inverse
from linear_moe.kernels.triton.delta_gradient import beta_gradient, reads_of_memory, writes_to_memory
from linear_moe.kernels.triton.delta_vector_gradient import rows_through
from linear_moe.kernels.triton.diag_levels import for_scores, halves, load_log_decay
from linear_moe.kernels.triton.layout import segment_of


@triton.jit
def sums_by(weights, high, low):
    """[C, BK]: sums over tokens with ``weights`` [C, C] of 0, 1 and halves, made in registers: no table is loaded."""
    weights = weights.to(high.dtype)
    b_sum = tl.dot(weights, high, input_precision="ieee")
    return tl.dot(weights, low, b_sum, input_precision="ieee")


@triton.jit
def to_borders(high, low, C: tl.constexpr):
    """log2 of up, [C, BK]."""
    i, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    is_near = (i >= C // 2) == (t >= C // 2)
    return sums_by(tl.where(is_near, tl.where(i >= t, 0.5, -0.5), 0.0), high, low)


@triton.jit
def half_of(b_up, last: tl.constexpr, C: tl.constexpr):
    """2^(G / 2) of the half whose ``last`` token this is, [1, BK]."""
    is_last = (tl.arange(0, C) == last)[:, None]
    return tl.exp2(tl.sum(tl.where(is_last, b_up, 0.0), 0))[None, :]


@triton.jit
def own_pairs(
    q, k, q_t: tl.constexpr, k_t: tl.constexpr, left, DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr
):
    """q_i . k_i, which no decay is in, [C]: not of rounded factors, and loaded again, since registers are short."""
    i_C = tl.arange(0, C)[:, None]
    own = tl.zeros([C], tl.float32)
    for block in range(0, (DK + BK - 1) // BK):
        i_K = block * BK + tl.arange(0, BK)[None, :]
        mask = (i_C < left) & ((i_K < DK) | (DK % BK == 0))
        b_q = tl.load(q + i_C * q_t + i_K, mask=mask, other=0.0).to(tl.float32)
        own += tl.sum(b_q * tl.load(k + i_C * k_t + i_K, mask=mask, other=0.0), 1)
    return own


@triton.jit(do_not_specialize=["num_tokens", "chunks_per_row", "num_documents", "b_b"])
def delta_solve_weak_kernel(
    q, k, beta, log_decay,
    weak,  # [S, H] int32: which chunks are
    plan,
    inverse, scores, scores_low,  # [S, H, C, C]: T - I, P, and what its rounding leaves out
    q_read, k_read, k_write,  # [L, H, DK]
    totals,  # [S, H, DK] float32
    num_tokens, num_heads: tl.constexpr, chunks_per_row, num_documents, scale,
    q_b, q_t: tl.constexpr, q_h, k_b, k_t: tl.constexpr, k_h,
    b_b, b_t: tl.constexpr, b_h, a_b, a_t: tl.constexpr, a_h, a_d: tl.constexpr,
    K_PER: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr,
    LEAST: tl.constexpr, PRECISION: tl.constexpr, HAS_OUTPUT: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: S * H. ``WIDE`` columns at a time are looked at, ``BK`` are solved."""
    dtype: tl.constexpr = inverse.dtype.element_ty
    head, chunk = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    row, start, _length, left = segment_of(
        plan, chunk, num_tokens, C, chunks_per_row, num_documents, IS_PACKED
    )
    if left > 0:
        i_C = tl.arange(0, C)
        batch, first = row.to(tl.int64), start.to(tl.int64)
        log_decay += batch * a_b + first * a_t + head.to(tl.int64) * a_h
        tile = chunk.to(tl.int64) * num_heads + head
        least = 0.0
        for block in range(0, (DK + WIDE - 1) // WIDE):
            i_K = block * WIDE + tl.arange(0, WIDE)
            mask = (i_C[:, None] < left) & ((i_K < DK) | (DK % WIDE == 0))[None, :]
            b_g = load_log_decay(log_decay + i_C[:, None] * a_t + i_K[None, :] * a_d, mask)
            b_g = tl.sum(tl.reshape(b_g, (2, C // 2, WIDE)), 1)
            least = tl.minimum(least, tl.min(tl.min(b_g, 1), 0))
            tl.store(totals + tile * DK + i_K, tl.exp2(tl.sum(b_g, 0)), mask=i_K < DK)
        tl.store(weak + tile, (least >= LEAST).to(tl.int32))
        if least >= LEAST:
            q += batch * q_b + first * q_t + (head // K_PER).to(tl.int64) * q_h
            k += batch * k_b + first * k_t + (head // K_PER).to(tl.int64) * k_h
            of_chunk = ((batch * num_tokens + first) * num_heads + head) * DK
            is_second = (i_C >= C // 2)[:, None]
            t_C = i_C[None, :]
            b_P = tl.zeros([C, C], tl.float32)
            b_L = tl.zeros([C, C], tl.float32)
            for block in range(0, (DK + BK - 1) // BK):
                i_K = block * BK + tl.arange(0, BK)[None, :]
                mask = (i_C[:, None] < left) & ((i_K < DK) | (DK % BK == 0))
                i_x = of_chunk + i_C[:, None] * (num_heads * DK) + i_K
                b_k = tl.load(k + i_C[:, None] * k_t + i_K, mask=mask, other=0.0)
                b_q = b_k
                if HAS_OUTPUT:
                    b_q = tl.load(q + i_C[:, None] * q_t + i_K, mask=mask, other=0.0)
                b_g = load_log_decay(log_decay + i_C[:, None] * a_t + i_K * a_d, mask)  # [C, BK]
                high, low = halves(b_g, dtype)
                later = tl.exp2(sums_by(tl.where(i_C[:, None] < t_C, 1.0, 0.0), high, low))
                tl.store(k_write + i_x, (b_k * later).to(dtype), mask=mask)
                up_to = tl.exp2(sums_by(tl.where(i_C[:, None] >= t_C, 1.0, 0.0), high, low))
                tl.store(k_read + i_x, (b_k * up_to).to(dtype), mask=mask)
                if HAS_OUTPUT:
                    tl.store(q_read + i_x, (b_q * up_to).to(dtype), mask=mask)

                # of writers in the first half; above the diagonal nothing counts
                up = to_borders(high, low, C)
                z_w = b_k * tl.exp2(-up)
                z_wT = tl.trans(for_scores(tl.where(is_second, 0.0, z_w), dtype))
                half = tl.where(t_C < C // 2, 0.5, tl.where(is_second, 1.0, 0.0))
                half = tl.where(i_C[:, None] >= t_C, half, tl.where(t_C < C // 2, -0.5, 0.0))
                factor = tl.exp2(sums_by(half, high, low))
                b_L = tl.dot(for_scores(b_k * factor, dtype), z_wT, b_L, input_precision="tf32")
                if HAS_OUTPUT:
                    b_P = tl.dot(for_scores(b_q * factor, dtype), z_wT, b_P, input_precision="tf32")
                # of those in the second
                z_wT = tl.trans(for_scores(tl.where(is_second, z_w, 0.0), dtype))
                factor = tl.exp2(up)
                b_L = tl.dot(for_scores(b_k * factor, dtype), z_wT, b_L, input_precision="tf32")
                if HAS_OUTPUT:
                    b_P = tl.dot(for_scores(b_q * factor, dtype), z_wT, b_P, input_precision="tf32")
            p_beta = beta + batch * b_b + (first + i_C) * b_t + head.to(tl.int64) * b_h
            b_beta = tl.load(p_beta, mask=i_C < left, other=0.0).to(tl.float32)
            p_tile = tile * (C * C) + i_C[:, None] * C + t_C
            if HAS_OUTPUT:
                own = own_pairs(q, k, q_t, k_t, left, DK, BK, C)
                b_P = tl.where(i_C[:, None] > t_C, b_P, tl.where(i_C[:, None] == t_C, own[:, None], 0.0))
                b_P *= (b_beta * scale)[None, :]
                b_P, b_low = halves(b_P, dtype)
                tl.store(scores + p_tile, b_P)
                tl.store(scores_low + p_tile, b_low)
            is_below = i_C[:, None] > t_C
            b_inverse = unit_lower_inverse(tl.where(is_below, b_L * b_beta[None, :], 0.0), C, PRECISION)
            tl.store(inverse + p_tile, tl.where(is_below, b_inverse, 0.0).to(inverse.dtype.element_ty))


@triton.jit
def of_readers(b_pairs, z_w, b_sum, between, C: tl.constexpr):
    """What readers get, [C, BK]: of ``b_sum`` and writers in the first half, then of those in the second."""
    dtype: tl.constexpr = z_w.dtype
    is_second = (tl.arange(0, C) >= C // 2)[:, None]
    b_sum = tl.dot(b_pairs, tl.where(is_second, 0.0, z_w).to(dtype), b_sum, input_precision="ieee")
    b_sum = tl.where(is_second, b_sum * between, b_sum)
    return tl.dot(b_pairs, tl.where(is_second, z_w, 0.0).to(dtype), b_sum, input_precision="ieee")


@triton.jit
def of_writers(b_X, b_Y, z_k, z_q, b_sum, IS_SECOND: tl.constexpr, C: tl.constexpr, HAS_OUTPUT: tl.constexpr):
    """``b_sum`` and what writers get of the readers in one half."""
    dtype: tl.constexpr = z_k.dtype
    is_in = ((tl.arange(0, C) >= C // 2) == IS_SECOND)[:, None]
    b_sum = tl.dot(tl.trans(b_X), tl.where(is_in, z_k, 0.0).to(dtype), b_sum, input_precision="ieee")
    if HAS_OUTPUT:
        b_sum = tl.dot(tl.trans(b_Y), tl.where(is_in, z_q, 0.0).to(dtype), b_sum, input_precision="ieee")
    return b_sum


@triton.jit(do_not_specialize=["num_tokens", "chunks_per_row", "num_documents", "num_all", "b_b"])
def delta_vector_gradient_weak_kernel(
    q, k, do, beta, log_decay, weak, totals, plan,
    pairs, own,  # delta_vector_pairs.py
    e, dv,  # [L, H, DV]
    states, d_states,  # [S, H, DK, DV]
    dq, dk, d_decay,  # [L, H, DK]
    d_beta,  # [PARTS, L, H] float32: as many as delta_vector_gradient.py leaves, NK or more
    num_tokens, num_heads: tl.constexpr, chunks_per_row, num_documents, num_all, scale,
    q_b, q_t: tl.constexpr, q_h, k_b, k_t: tl.constexpr, k_h, o_b, o_t: tl.constexpr,
    o_h, b_b, b_t: tl.constexpr, b_h, a_b, a_t: tl.constexpr, a_h, a_d: tl.constexpr,
    K_PER: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PARTS: tl.constexpr, C: tl.constexpr, HAS_OUTPUT: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: S * H * NK. Chunks that are ``weak``; the others, and tokens after the last document, are left."""
    dtype: tl.constexpr = e.dtype.element_ty
    NK: tl.constexpr = (DK + BK - 1) // BK
    i_k = tl.program_id(0) % NK
    head = (tl.program_id(0) // NK) % num_heads
    chunk = tl.program_id(0) // NK // num_heads
    row, start, _length, left = segment_of(
        plan, chunk, num_tokens, C, chunks_per_row, num_documents, IS_PACKED
    )
    place = chunk.to(tl.int64) * num_heads + head
    if (left > 0) & (tl.load(weak + place) != 0):
        i_C, i_K = tl.arange(0, C), i_k * BK + tl.arange(0, BK)
        m_K = (i_K < DK) | (DK % BK == 0)
        m_C, is_second = i_C < left, (i_C >= C // 2)[:, None]
        mask = m_C[:, None] & m_K[None, :]
        batch, at, token = row.to(tl.int64), start.to(tl.int64), row * num_tokens + start
        g_t: tl.constexpr = num_heads * DK
        i_g = token.to(tl.int64) * g_t + head * DK + i_C[:, None] * g_t + i_K[None, :]
        v_t: tl.constexpr = num_heads * DV
        of_v = token.to(tl.int64) * v_t + head * DV
        do += batch * o_b + at * o_t + head.to(tl.int64) * o_h
        e, dv = e + of_v, dv + of_v
        q += batch * q_b + at * q_t + (head // K_PER).to(tl.int64) * q_h
        k += batch * k_b + at * k_t + (head // K_PER).to(tl.int64) * k_h
        log_decay += batch * a_b + at * a_t + head.to(tl.int64) * a_h
        states, d_states = states + place * (DK * DV), d_states + place * (DK * DV)
        p_beta = beta + batch * b_b + (at + i_C) * b_t + head.to(tl.int64) * b_h
        b_beta = tl.load(p_beta, mask=m_C, other=0.0).to(tl.float32)

        high, low = halves(load_log_decay(log_decay + i_C[:, None] * a_t + i_K[None, :] * a_d, mask), dtype)
        b_up = to_borders(high, low, C)  # [C, BK]
        half_1, half_2 = half_of(b_up, C // 2 - 1, C), half_of(b_up, C - 1, C)
        between = half_1 * half_2
        up, down = tl.exp2(b_up), tl.exp2(-b_up)
        p_k = k + i_C[:, None] * k_t + i_K[None, :]
        b_k = tl.load(p_k, mask=mask, other=0.0).to(tl.float32)
        z_w = (b_k * b_beta[:, None] * down).to(dtype)
        z_k = (b_k * up).to(dtype)
        p_pairs = pairs + place * (2 * C * C) + i_C[:, None] * C + i_C[None, :]
        b_X = tl.load(p_pairs + C * C)  # -X
        z_q, b_Y = z_k, b_X
        if HAS_OUTPUT:
            z_q = tl.load(q + i_C[:, None] * q_t + i_K[None, :], mask=mask, other=0.0).to(tl.float32)
            z_q = (z_q * up).to(dtype)
            b_Y = tl.load(p_pairs)

        # readers
        b_dq, b_dk = reads_of_memory(do, dv, states, o_t, v_t, left, i_K, m_K, DV, BK, BV, C, HAS_OUTPUT)
        b_dk = of_readers(b_X, z_w, b_dk * -half_1, between, C)
        b_own = z_k.to(tl.float32) * b_dk
        b_dk *= up
        if HAS_OUTPUT:
            b_dq = of_readers(b_Y, z_w, b_dq * (half_1 * scale), between, C)
            b_own += z_q.to(tl.float32) * b_dq
            tl.store(dq + i_g, (b_dq * up).to(dq.dtype.element_ty), mask=mask)

        # writers
        b_w = writes_to_memory(e, d_states, v_t, left, i_K, m_K, DV, BK, BV, C) * half_2
        passes = tl.sum(tl.where(is_second, b_w, b_w * between) * z_w.to(tl.float32), 0)
        b_w = of_writers(b_X, b_Y, z_k, z_q, b_w, True, C, HAS_OUTPUT)
        b_w = tl.where(is_second, b_w, b_w * between)
        b_w = of_writers(b_X, b_Y, z_k, z_q, b_w, False, C, HAS_OUTPUT)
        b_own -= z_w.to(tl.float32) * b_w
        b_w *= down
        tl.store(dk + i_g, (b_w * b_beta[:, None] + b_dk).to(dk.dtype.element_ty), mask=mask)
        p_dbeta = d_beta + (token.to(tl.int64) * num_heads + head) + i_C * num_heads
        of_part = tl.cast(num_all, tl.int64) * num_heads
        of_errors = tl.load(own + place * C + i_C)
        terms = tl.sum(tl.load(p_k, mask=mask, other=0.0).to(tl.float32) * b_w, 1)
        tl.store(p_dbeta + i_k * of_part, beta_gradient(terms, of_errors, b_beta, i_k == 0), mask=m_C)
        for part in range(NK + i_k, PARTS, NK):
            tl.store(p_dbeta + part * of_part, tl.zeros([C], tl.float32), mask=m_C)

        through = rows_through(states, d_states, i_K, m_K, DV, BV)
        passes += through * tl.load(totals + place * DK + i_K, mask=m_K, other=0.0)
        high, low = halves(b_own, dtype)
        b_log = sums_by(tl.where(i_C[:, None] <= i_C[None, :], 1.0, 0.0), high, low) + passes[None, :]
        tl.store(d_decay + i_g, b_log.to(d_decay.dtype.element_ty), mask=mask)

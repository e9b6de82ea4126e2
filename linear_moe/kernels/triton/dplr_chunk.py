# mypy: allow-untyped-defs
"""What every chunk of a diagonal plus low-rank memory knows without the memory: its system's inverse, and its scores.

    A_ab_ij = sum_d a_id b_jd D_ijd,  A_ak_ij = sum_d a_id k_jd D_ijd   i > j    D_ij = decay of tokens j + 1 .. i - 1
    A_qb_ij = scale * sum_d q_id b_jd (own_i D_ij)_d,   A_qk as it      i >= j   own_i = decay of token i
    T = (I - A_ab)^-1

``a`` reads what the memory held before its own token's decay, and q what it holds after it: the exponents are those of
``level_sums(reads_first=True)`` (diag_levels.py), none positive, and a reader q has its token's decay beside them. Kept
are T - I, the other three, q and a as they read the memory before the chunk, b and k as they are written to the one
after it, and what the chunk keeps. Without q (``HAS_OUTPUT``) two scores and one reader less.

Letters: S chunks of all documents, H heads, C tokens in a chunk, DK the dim of k, BK a block of it, L tokens of all
rows. ``K_PER`` heads of the scan share one head of k. docs/kernels_dplr.md has the derivation.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.delta_chunk import unit_lower_inverse
from linear_moe.kernels.triton.diag_levels import halves, load_log_decay, sum_over
from linear_moe.kernels.triton.diag_weak import keeps
from linear_moe.kernels.triton.layout import segment_of


@triton.jit
def level_pairs(table, level, LEVELS: tl.constexpr, C: tl.constexpr):
    """[C, C]: whether token i reads what j writes at this level."""
    i_C = tl.arange(0, C)
    p_pairs = table + (2 * (LEVELS + 2) + level) * (C * C) + i_C[:, None] * C + i_C[None, :]
    return (tl.load(p_pairs) > 0) & (i_C[:, None] > i_C[None, :])


@triton.jit
def score(x, y, mask):
    """[C, C]: x y^T where the mask says so."""
    return tl.where(mask, tl.dot(x, tl.trans(y), input_precision="ieee"), 0.0)


@triton.jit(do_not_specialize=["num_tokens", "chunks_per_row", "num_documents"])
def dplr_solve_kernel(
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
    """Grid: S * H. Chunks that keep ``LEAST`` of every row of the memory are left: dplr_weak.py solved them."""
    dtype: tl.constexpr = inverse.dtype.element_ty
    head, chunk = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    row, start, _length, left = segment_of(
        plan, chunk, num_tokens, C, chunks_per_row, num_documents, IS_PACKED
    )
    tile = chunk.to(tl.int64) * num_heads + head
    is_here = left > 0
    if LEAST < 1:
        is_here = is_here & (not keeps(totals, tile, LEAST, DK))
    if is_here:
        i_C = tl.arange(0, C)
        batch, first, group = row.to(tl.int64), start.to(tl.int64), (head // K_PER).to(tl.int64)
        q += batch * q_r + first * q_t + group * q_h
        k += batch * k_r + first * k_t + group * k_h
        a += batch * a_r + first * a_t + group * a_h
        b += batch * b_r + first * b_t + group * b_h
        log_decay += batch * g_r + first * g_t + head.to(tl.int64) * g_h
        of_chunk = ((batch * num_tokens + first) * num_heads + head) * DK
        b_ab = tl.zeros([C, C], tl.float32)
        b_ak = tl.zeros([C, C], tl.float32)
        b_qb = tl.zeros([C, C], tl.float32)
        b_qk = tl.zeros([C, C], tl.float32)
        for block in range(0, (DK + BK - 1) // BK):
            i_K = block * BK + tl.arange(0, BK)
            mask = (i_C[:, None] < left) & (i_K[None, :] < DK)
            b_g = load_log_decay(log_decay + i_C[:, None] * g_t + i_K[None, :] * g_d, mask)  # [C, BK]
            tl.store(totals + tile * DK + i_K, tl.exp2(tl.sum(b_g, 0)), mask=i_K < DK)
            high, low = halves(b_g, dtype)
            b_k = tl.load(k + i_C[:, None] * k_t + i_K[None, :], mask=mask, other=0.0).to(tl.float32)
            b_a = tl.load(a + i_C[:, None] * a_t + i_K[None, :], mask=mask, other=0.0).to(tl.float32)
            b_b = tl.load(b + i_C[:, None] * b_t + i_K[None, :], mask=mask, other=0.0).to(tl.float32)
            if HAS_OUTPUT:
                b_q = tl.load(q + i_C[:, None] * q_t + i_K[None, :], mask=mask, other=0.0).to(tl.float32)
                is_own = i_C[:, None] == i_C[None, :]
                b_qb += tl.where(is_own, tl.sum(b_q * b_b, 1)[:, None], 0.0)
                b_qk += tl.where(is_own, tl.sum(b_q * b_k, 1)[:, None], 0.0)
                b_q = b_q * tl.exp2(b_g)
            for level in range(0, LEVELS):
                factor = tl.exp2(sum_over(table, level, high, low))
                is_level = level_pairs(table, level, LEVELS, C)
                z_b, z_k, z_a = (b_b * factor).to(dtype), (b_k * factor).to(dtype), (b_a * factor).to(dtype)
                b_ab += score(z_a, z_b, is_level)
                b_ak += score(z_a, z_k, is_level)
                if HAS_OUTPUT:
                    z_q = (b_q * factor).to(dtype)
                    b_qb += score(z_q, z_b, is_level)
                    b_qk += score(z_q, z_k, is_level)
            i_x = of_chunk + i_C[:, None] * (num_heads * DK) + i_K[None, :]
            read = tl.exp2(sum_over(table, LEVELS, high, low))
            tl.store(a_read + i_x, (b_a * read).to(dtype), mask=mask)
            if HAS_OUTPUT:
                tl.store(q_read + i_x, (b_q * (read * scale)).to(dtype), mask=mask)
            write = tl.exp2(sum_over(table, LEVELS + 1, high, low))
            tl.store(b_write + i_x, (b_b * write).to(dtype), mask=mask)
            tl.store(k_write + i_x, (b_k * write).to(dtype), mask=mask)
        i_tile = tile * (C * C) + i_C[:, None] * C + i_C[None, :]
        tl.store(scores_ak + i_tile, b_ak.to(dtype))
        if HAS_OUTPUT:
            tl.store(scores_qb + i_tile, (b_qb * scale).to(dtype))
            tl.store(scores_qk + i_tile, (b_qk * scale).to(dtype))
        b_T = unit_lower_inverse(-b_ab, C, PRECISION)
        tl.store(inverse + i_tile, tl.where(i_C[:, None] > i_C[None, :], b_T, 0.0).to(dtype))

# mypy: allow-untyped-defs
"""The delta rule with a decay of its own for each row of the memory: what delta_chunk.py is for scalar decays.

    L_ij = sum_d k_id k_jd D_ijd,    P_ij = scale beta_j sum_d q_id k_jd D_ijd        D_ijd = decay of tokens j + 1 .. i

Both are sums over levels, as in diag_levels.py: at the level where tokens i and j part, one tile of k, decayed to the
border between them, holds readers and writers, so that no exponent is positive. Beside them the kernel leaves k and q
as they read the memory before the chunk, k as it is written to the memory after it, and what the chunk keeps: with
these the scans and the outputs know no decay of their own. Without q (``HAS_OUTPUT``) there are no scores.

Letters: S chunks of all documents, H heads, C tokens in a chunk, DK the dim of k, BK a block of it, L tokens of all
rows. ``K_PER`` heads of the scan share one head of k.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.delta_chunk import unit_lower_inverse
from linear_moe.kernels.triton.diag_levels import halves, load_log_decay, sum_over
from linear_moe.kernels.triton.layout import segment_of


@triton.jit(do_not_specialize=["num_tokens", "chunks_per_row", "num_documents", "b_b"])
def solve_levels_kernel(
    q, k, beta, log_decay,
    table,  # level_sums of diag_levels.py
    plan,
    inverse, scores,  # [S, H, C, C]: T - I, and P
    q_read, k_read, k_write,  # [L, H, DK]
    totals,  # [S, H, DK] float32
    num_tokens, num_heads: tl.constexpr, chunks_per_row, num_documents, scale,
    q_b, q_t: tl.constexpr, q_h, k_b, k_t: tl.constexpr, k_h,
    b_b, b_t: tl.constexpr, b_h, a_b, a_t: tl.constexpr, a_h, a_d: tl.constexpr,
    K_PER: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    PRECISION: tl.constexpr, HAS_OUTPUT: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: S * H."""
    head, chunk = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    row, start, _length, left = segment_of(
        plan, chunk, num_tokens, C, chunks_per_row, num_documents, IS_PACKED
    )
    if left > 0:
        i_C = tl.arange(0, C)
        batch, first = row.to(tl.int64), start.to(tl.int64)
        q += batch * q_b + first * q_t + (head // K_PER).to(tl.int64) * q_h
        k += batch * k_b + first * k_t + (head // K_PER).to(tl.int64) * k_h
        log_decay += batch * a_b + first * a_t + head.to(tl.int64) * a_h
        of_chunk = ((batch * num_tokens + first) * num_heads + head) * DK
        q_read, k_read, k_write = q_read + of_chunk, k_read + of_chunk, k_write + of_chunk
        tile = chunk.to(tl.int64) * num_heads + head
        b_P = tl.zeros([C, C], tl.float32)
        b_L = tl.zeros([C, C], tl.float32)
        i_pair = i_C[:, None] * C + i_C[None, :]
        for block in range(0, (DK + BK - 1) // BK):
            i_K = block * BK + tl.arange(0, BK)
            m_K = (i_K < DK) | (DK % BK == 0)
            mask = (i_C[:, None] < left) & m_K[None, :]
            if HAS_OUTPUT:
                b_q = tl.load(q + i_C[:, None] * q_t + i_K[None, :], mask=mask, other=0.0)
            b_k = tl.load(k + i_C[:, None] * k_t + i_K[None, :], mask=mask, other=0.0)
            b_a = load_log_decay(log_decay + i_C[:, None] * a_t + i_K[None, :] * a_d, mask)  # [C, BK]
            tl.store(totals + tile * DK + i_K, tl.exp2(tl.sum(b_a, 0)), mask=m_K)
            high, low = halves(b_a, inverse.dtype.element_ty)
            for level in range(0, LEVELS):
                factor = tl.exp2(sum_over(table, level, high, low))
                b_z = (b_k * factor).to(inverse.dtype.element_ty)
                is_level = (
                    tl.load(table + (2 * (LEVELS + 2) + level) * (C * C) + i_pair) > 0
                )  # in both orders
                if HAS_OUTPUT:
                    b_x = (b_q * factor).to(inverse.dtype.element_ty)
                    b_P += tl.where(is_level, tl.dot(b_x, tl.trans(b_z), input_precision="ieee"), 0.0)
                b_L += tl.where(is_level, tl.dot(b_z, tl.trans(b_z), input_precision="ieee"), 0.0)
            p_K = i_C[:, None] * (num_heads * DK) + i_K[None, :]
            read = tl.exp2(sum_over(table, LEVELS, high, low))
            if HAS_OUTPUT:
                own = tl.sum(b_q.to(tl.float32) * b_k.to(tl.float32), 1)
                b_P += tl.where(i_C[:, None] == i_C[None, :], own[:, None], 0.0)
                tl.store(q_read + p_K, (b_q * read).to(q_read.dtype.element_ty), mask=mask)
            tl.store(k_read + p_K, (b_k * read).to(k_read.dtype.element_ty), mask=mask)
            write = tl.exp2(sum_over(table, LEVELS + 1, high, low))
            tl.store(k_write + p_K, (b_k * write).to(k_write.dtype.element_ty), mask=mask)
        p_beta = beta + batch * b_b + (first + i_C) * b_t + head.to(tl.int64) * b_h
        b_beta = tl.load(p_beta, mask=i_C < left, other=0.0).to(tl.float32)
        p_tile, is_below = tile * (C * C) + i_pair, i_C[:, None] > i_C[None, :]
        if HAS_OUTPUT:
            b_P = tl.where(i_C[:, None] >= i_C[None, :], b_P * (b_beta * scale)[None, :], 0.0)
            tl.store(scores + p_tile, b_P.to(scores.dtype.element_ty))
        b_inverse = unit_lower_inverse(tl.where(is_below, b_L * b_beta[None, :], 0.0), C, PRECISION)
        tl.store(inverse + p_tile, tl.where(is_below, b_inverse, 0.0).to(inverse.dtype.element_ty))

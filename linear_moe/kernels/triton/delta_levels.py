# mypy: allow-untyped-defs
"""The delta rule with a decay of its own for each row of the memory: what delta_chunk.py is for scalar decays.

    L_ij = sum_d k_id k_jd D_ijd,    P_ij = scale beta_j sum_d q_id k_jd D_ijd        D_ijd = decay of tokens j + 1 .. i

Both are sums over levels, as in diag_levels.py: at the level where tokens i and j part, one tile of k, decayed to the
border between them, holds readers and writers, so that no exponent is positive. Pairs in one block of 16 tokens are
products of that size (delta_near.py), the others of whole chunks, in a loop of their own, which holds registers apart.
Beside them the kernel leaves k and q
as they read the memory before the chunk, k as it is written to the memory after it, and what the chunk keeps: with
these the scans and the outputs know no decay of their own. Without q (``HAS_OUTPUT``) there are no scores.

Letters: S chunks of all documents, H heads, C tokens in a chunk, N = C / 16, DK the dim of k, BK a block of it, L
tokens of all rows. ``K_PER`` heads of the scan share one head of k.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.delta_chunk import unit_lower_inverse
from linear_moe.kernels.triton.delta_near import far_sums, near_sums, of_blocks, on_diagonal
from linear_moe.kernels.triton.diag_levels import for_scores, halves, load_log_decay
from linear_moe.kernels.triton.layout import segment_of


@triton.jit(do_not_specialize=["num_tokens", "chunks_per_row", "num_documents", "b_b"])
def delta_solve_levels_kernel(
    q, k, beta, log_decay,
    table,  # level_sums of diag_levels.py
    weak,  # [S, H]: chunks that delta_weak.py has solved, with HAS_WEAK
    plan,
    inverse, scores, scores_low,  # [S, H, C, C]: T - I, P, and in half precision what its rounding leaves out
    q_read, k_read, k_write,  # [L, H, DK]
    totals,  # [S, H, DK] float32
    num_tokens, num_heads: tl.constexpr, chunks_per_row, num_documents, scale,
    q_b, q_t: tl.constexpr, q_h, k_b, k_t: tl.constexpr, k_h,
    b_b, b_t: tl.constexpr, b_h, a_b, a_t: tl.constexpr, a_h, a_d: tl.constexpr,
    K_PER: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    PRECISION: tl.constexpr, HAS_WEAK: tl.constexpr, HAS_OUTPUT: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: S * H. Chunks that are ``weak`` are left."""
    head, chunk = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    row, start, _length, left = segment_of(
        plan, chunk, num_tokens, C, chunks_per_row, num_documents, IS_PACKED
    )
    tile = chunk.to(tl.int64) * num_heads + head
    is_here = left > 0
    if HAS_WEAK:
        is_here = is_here & (tl.load(weak + tile) == 0)
    if is_here:
        i_C = tl.arange(0, C)
        batch, first = row.to(tl.int64), start.to(tl.int64)
        q += batch * q_b + first * q_t + (head // K_PER).to(tl.int64) * q_h
        k += batch * k_b + first * k_t + (head // K_PER).to(tl.int64) * k_h
        log_decay += batch * a_b + first * a_t + head.to(tl.int64) * a_h
        of_chunk = ((batch * num_tokens + first) * num_heads + head) * DK
        q_read, k_read, k_write = q_read + of_chunk, k_read + of_chunk, k_write + of_chunk
        N: tl.constexpr = C // 16
        dtype: tl.constexpr = inverse.dtype.element_ty
        OF_SCORES: tl.constexpr = "tf32" if dtype == tl.bfloat16 else "ieee"
        n, i = tl.arange(0, N), tl.arange(0, 16)
        i_T = n[:, None, None] * 16 + i[None, :, None]

        b_P, b_L = tl.zeros([N, 16, 16], tl.float32), tl.zeros([N, 16, 16], tl.float32)
        for block in range(0, (DK + BK - 1) // BK):  # pairs of tokens in one block of 16
            i_K = block * BK + tl.arange(0, BK)[None, None, :]
            mask = (i_T < left) & ((i_K < DK) | (DK % BK == 0))
            b_k = tl.load(k + i_T * k_t + i_K, mask=mask, other=0.0)  # [N, 16, BK]
            if HAS_OUTPUT:
                b_q = tl.load(q + i_T * q_t + i_K, mask=mask, other=0.0)
                own = tl.dot(b_q, tl.permute(b_k, (0, 2, 1)), input_precision="ieee")
                b_P += tl.where((i[:, None] == i[None, :])[None], own, 0.0)
            high, low = halves(load_log_decay(log_decay + i_T * a_t + i_K * a_d, mask), dtype)
            for level in range(0, 4):
                factor = tl.exp2(near_sums(table, level, high, low, C))
                is_level = (((i[:, None] ^ i[None, :]) >> level) == 1)[None]
                b_z = for_scores(b_k * factor, dtype)
                b_zT = tl.permute(b_z, (0, 2, 1))
                if HAS_OUTPUT:
                    b_x = for_scores(b_q * factor, dtype)
                    b_P += tl.where(is_level, tl.dot(b_x, b_zT, input_precision=OF_SCORES), 0.0)
                b_L += tl.where(is_level, tl.dot(b_z, b_zT, input_precision=OF_SCORES), 0.0)

        b_P, b_L = on_diagonal(b_P, C), on_diagonal(b_L, C)
        is_earlier, is_later = n[None, :] < n[:, None], n[None, :] > n[:, None]
        for block in range(0, (DK + BK - 1) // BK):  # the other pairs, and what the memory meets
            i_K = block * BK + tl.arange(0, BK)[None, None, :]
            mask = (i_T < left) & ((i_K < DK) | (DK % BK == 0))
            b_k = tl.load(k + i_T * k_t + i_K, mask=mask, other=0.0)
            if HAS_OUTPUT:
                b_q = tl.load(q + i_T * q_t + i_K, mask=mask, other=0.0)
            high, low = halves(load_log_decay(log_decay + i_T * a_t + i_K * a_d, mask), dtype)
            up_to = near_sums(table, LEVELS, high, low, C)
            later = near_sums(table, LEVELS + 1, high, low, C)
            sums = tl.min(up_to, 1)  # [N, BK], of whole blocks: sums only fall
            i_total = block * BK + tl.arange(0, BK)
            tl.store(totals + tile * DK + i_total, tl.exp2(tl.sum(sums, 0)), mask=i_total < DK)
            p_K = i_T * (num_heads * DK) + i_K
            read = tl.exp2(up_to + of_blocks(sums, is_earlier))
            if HAS_OUTPUT:
                tl.store(q_read + p_K, (b_q * read).to(dtype), mask=mask)
            tl.store(k_read + p_K, (b_k * read).to(dtype), mask=mask)
            write = tl.exp2(later + of_blocks(sums, is_later))
            tl.store(k_write + p_K, (b_k * write).to(dtype), mask=mask)
            for level in tl.static_range(4, LEVELS):
                b_sums = tl.where((((n >> (level - 4)) & 1) == 1)[:, None, None], up_to, later)
                if level > 4:
                    b_sums += far_sums(sums, level, C)
                factor = tl.exp2(b_sums)
                b_z = tl.reshape(for_scores(b_k * factor, dtype), (C, BK))
                if HAS_OUTPUT:
                    b_x = tl.reshape(for_scores(b_q * factor, dtype), (C, BK))
                if level == LEVELS - 1:  # readers are all later than writers
                    is_reader = (i_C >> level == 1)[:, None]
                    b_zT = tl.trans(tl.where(is_reader, 0.0, b_z).to(b_z.dtype))
                    b_z = tl.where(is_reader, b_z, 0.0).to(b_z.dtype)
                    if HAS_OUTPUT:
                        b_x = tl.where(is_reader, b_x, 0.0).to(b_x.dtype)
                        b_P = tl.dot(b_x, b_zT, b_P, input_precision=OF_SCORES)
                    b_L = tl.dot(b_z, b_zT, b_L, input_precision=OF_SCORES)
                else:
                    is_level = ((i_C[:, None] ^ i_C[None, :]) >> level) == 1
                    if HAS_OUTPUT:
                        b_P += tl.where(is_level, tl.dot(b_x, tl.trans(b_z), input_precision=OF_SCORES), 0.0)
                    b_L += tl.where(is_level, tl.dot(b_z, tl.trans(b_z), input_precision=OF_SCORES), 0.0)
        p_beta = beta + batch * b_b + (first + i_C) * b_t + head.to(tl.int64) * b_h
        b_beta = tl.load(p_beta, mask=i_C < left, other=0.0).to(tl.float32)
        p_tile, is_below = tile * (C * C) + i_C[:, None] * C + i_C[None, :], i_C[:, None] > i_C[None, :]
        if HAS_OUTPUT:
            b_P = tl.where(i_C[:, None] >= i_C[None, :], b_P * (b_beta * scale)[None, :], 0.0)
            b_P, b_low = halves(b_P, dtype)
            tl.store(scores + p_tile, b_P)
            if dtype != tl.float32:
                tl.store(scores_low + p_tile, b_low)
        b_inverse = unit_lower_inverse(tl.where(is_below, b_L * b_beta[None, :], 0.0), C, PRECISION)
        tl.store(inverse + p_tile, tl.where(is_below, b_inverse, 0.0).to(inverse.dtype.element_ty))

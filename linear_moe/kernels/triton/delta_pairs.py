# mypy: allow-untyped-defs
"""What tokens of a chunk give each other in the backward pass of the delta rule, for decays that are scalars, or none.

    Y_ij = scale beta_j D_ij do_i . e_j  (i >= j)          X_ij = -beta_j D_ij dv_i . e_j  (i > j)
    Z_ij = Y_ij q_i . k_j + X_ij k_i . k_j
    d beta_j = sum_i Z_ij / beta_j + .. = e_j . dv_j / beta_j            d log a_t = sum_{i >= t > j} Z_ij + ..

with D as in delta_chunk.py. The sum of pairs on both sides of t is that of rows minus that of columns from t on: the
others, the same numbers, are added and taken away again. A kernel of its own: blocks of K of delta_gradient.py would
compute the same again, and in one order is enough, since what is loaded can be transposed.

Letters: S chunks of all documents, H heads, C tokens in a chunk, DK and DV the dims of k and v, BK and BV blocks of
them, L tokens of all rows.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.delta_chunk import factors
from linear_moe.kernels.triton.delta_gradient import beta_gradient, products_of_tokens
from linear_moe.kernels.triton.layout import segment_of


@triton.jit(do_not_specialize=["num_tokens", "chunks_per_row", "num_documents", "b_b"])
def delta_pairs_kernel(
    q, k, do, beta, log_decay, sums, plan,
    e, dv,  # [L, H, DV]
    pairs,  # [S, H, 2, C, C]: Y, if there is do, and X
    d_beta, d_decay,  # [L, H] float32
    num_tokens, num_heads: tl.constexpr, chunks_per_row, num_documents, scale,
    q_b, q_t: tl.constexpr, q_h, k_b, k_t: tl.constexpr, k_h,
    o_b, o_t: tl.constexpr, o_h, b_b, b_t: tl.constexpr, b_h,
    K_PER: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, DECAY: tl.constexpr, HAS_OUTPUT: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: S * H."""
    head, chunk = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    row, start, length, left = segment_of(
        plan, chunk, num_tokens, C, chunks_per_row, num_documents, IS_PACKED
    )
    i_C = tl.arange(0, C)
    batch, at, token = row.to(tl.int64), start.to(tl.int64), row * num_tokens + start
    i_token = (token.to(tl.int64) + i_C) * num_heads + head
    if left > 0:
        v_t: tl.constexpr = num_heads * DV
        of_v = token.to(tl.int64) * v_t + head * DV
        do += batch * o_b + at * o_t + head.to(tl.int64) * o_h
        e, dv = e + of_v, dv + of_v
        q += batch * q_b + at * q_t + (head // K_PER).to(tl.int64) * q_h
        k += batch * k_b + at * k_t + (head // K_PER).to(tl.int64) * k_h
        p_beta = beta + batch * b_b + (at + i_C) * b_t + head.to(tl.int64) * b_h
        b_beta = tl.load(p_beta, mask=i_C < left, other=0.0).to(tl.float32)
        is_below, is_own = i_C[:, None] > i_C[None, :], i_C[:, None] == i_C[None, :]

        b_y, b_x = products_of_tokens(do, e, dv, e, o_t, v_t, v_t, v_t, left, DV, BV, C, HAS_OUTPUT)
        b_own = tl.sum(tl.where(is_own, b_x, 0.0), 0)  # e_j . dv_j
        HAS_LOW: tl.constexpr = k.dtype.element_ty == tl.float32
        _, _, _, pair = factors(
            log_decay, sums, head, num_heads, token, chunk, left, DECAY, False, C, HAS_LOW
        )
        b_x = tl.where(is_below, b_x * -pair, 0.0)
        p_pairs = pairs + (chunk.to(tl.int64) * num_heads + head) * (2 * C * C)
        p_pairs += i_C[:, None] * C + i_C[None, :]
        tl.store(p_pairs + C * C, (b_x * b_beta[None, :]).to(pairs.dtype.element_ty))
        if HAS_OUTPUT:
            b_y = b_y * pair * scale
            tl.store(p_pairs, (b_y * b_beta[None, :]).to(pairs.dtype.element_ty))

        b_qk, b_z = products_of_tokens(q, k, k, k, q_t, k_t, k_t, k_t, left, DK, BK, C, HAS_OUTPUT)
        b_z = b_z * b_x + b_qk * b_y
        b_dbeta = tl.sum(b_z, 0)
        tl.store(d_beta + i_token, beta_gradient(b_dbeta, b_own, b_beta, True), mask=i_C < left)
        if DECAY != 0:
            b_z = tl.where(is_below, b_z * b_beta[None, :], 0.0)
            b_R = tl.sum(b_z, 1) - tl.sum(b_z, 0)
            b_log = tl.sum(tl.where(i_C[:, None] >= i_C[None, :], b_R[:, None], 0.0), 0)
            tl.store(d_decay + i_token, b_log, mask=i_C < left)
    else:  # after the last document; unused chunks have no tokens
        none = tl.zeros([C], tl.float32)
        tl.store(d_beta + i_token, none, mask=i_C < length)
        if DECAY != 0:
            tl.store(d_decay + i_token, none, mask=i_C < length)

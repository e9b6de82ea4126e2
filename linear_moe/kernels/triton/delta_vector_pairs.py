# mypy: allow-untyped-defs
"""What tokens of a chunk give each other in the backward pass of the delta rule with a decay for each row.

    Y_ij = Y_ji = scale do_i . e_j  (i >= j)     X_ij = X_ji = dv_i . e_j  (i > j)     own_i = e_i . dv_i

without any decay: below the diagonal what readers get of writers, above it what writers get of readers. Both orders
are products of their own, of the same numbers: what cancels in delta_vector_gradient.py relies on it. A kernel of its
own: every block of K of delta_vector_gradient.py would compute the same again, more work than it has of its own.

Letters: S chunks of all documents, H heads, C tokens in a chunk, DV the dim of v, BV a block of it, L tokens.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.delta_gradient import products_of_tokens
from linear_moe.kernels.triton.layout import segment_of


@triton.jit(do_not_specialize=["num_tokens", "chunks_per_row", "num_documents"])
def delta_vector_pairs_kernel(
    do, e, dv,
    weak,  # [S, H], with HAS_WEAK
    plan,
    pairs,  # [S, H, 2, C, C]: Y, if there is do, and X
    own,  # [S, H, C] float32
    num_tokens, num_heads: tl.constexpr, chunks_per_row, num_documents, scale,
    o_b, o_t: tl.constexpr, o_h,
    DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, HAS_WEAK: tl.constexpr,
    HAS_OUTPUT: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: S * H. In both orders for levels; of chunks that are ``weak`` Y and -X, and zeros above the diagonal."""
    head, chunk = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    row, start, _length, left = segment_of(
        plan, chunk, num_tokens, C, chunks_per_row, num_documents, IS_PACKED
    )
    if left > 0:
        i_C = tl.arange(0, C)
        batch, at, token = row.to(tl.int64), start.to(tl.int64), row * num_tokens + start
        tile = chunk.to(tl.int64) * num_heads + head
        v_t: tl.constexpr = num_heads * DV
        of_v = token.to(tl.int64) * v_t + head * DV
        do += batch * o_b + at * o_t + head.to(tl.int64) * o_h
        e, dv = e + of_v, dv + of_v

        b_y, b_x = products_of_tokens(do, e, dv, e, o_t, v_t, v_t, v_t, left, DV, BV, C, HAS_OUTPUT)
        is_own = i_C[:, None] == i_C[None, :]
        tl.store(own + tile * C + i_C, tl.sum(tl.where(is_own, b_x, 0.0), 1))
        is_above = i_C[:, None] < i_C[None, :]
        p_pairs = pairs + tile * (2 * C * C) + i_C[:, None] * C + i_C[None, :]
        is_weak = False
        if HAS_WEAK:
            is_weak = tl.load(weak + tile) != 0
        if is_weak:
            if HAS_OUTPUT:
                b_y = tl.where(is_above, 0.0, b_y * scale)
                tl.store(p_pairs, b_y.to(pairs.dtype.element_ty))
            b_x = tl.where(is_above | is_own, 0.0, -b_x)
            tl.store(p_pairs + C * C, b_x.to(pairs.dtype.element_ty))
        else:
            b_u, b_v = products_of_tokens(e, do, e, dv, v_t, o_t, v_t, v_t, left, DV, BV, C, HAS_OUTPUT)
            if HAS_OUTPUT:
                tl.store(p_pairs, (tl.where(is_above, b_u, b_y) * scale).to(pairs.dtype.element_ty))
            tl.store(p_pairs + C * C, tl.where(is_above, b_v, b_x).to(pairs.dtype.element_ty))

# mypy: allow-untyped-defs
"""Gradients of q, k, beta and of decays that are scalars, from what the two scans left: all chunks at once.

With S before the chunk, dS the gradient of the memory after it, Y, X and Z of delta_pairs.py, which comes first, and
sums over columns of V, docs/kernels_delta.md derives

    dq = scale * read * (do S^T) + Y K
    dk = -read * (dv S^T) + write * beta * (e dS^T) + Y^T Q + (X + X^T) K
    d beta_j = sum_i Z_ij / beta_j + write_j k_j . (e dS^T)_j = e_j . dv_j / beta_j
    d log a_t = sum_{i >= t > j} Z_ij + sum_{i >= t} R_i + sum_{j < t} W_j + total * <S, dS>
    R_i = read_i (scale * q_i . (do S^T)_i - k_i . (dv S^T)_i)
    W_j = beta_j write_j k_j . (e dS^T)_j

A program owns a chunk, a head and BK columns of K. Both last gradients are sums over K, so every block leaves its
part. No product is transposed (see diag_scan.py on Triton), only what is loaded. Where nothing reads the memory but its
end (``HAS_OUTPUT``), all with q and do is left out.

Letters: S chunks of all documents, H heads, C tokens in a chunk, DK and DV the dims of k and v, BK a block of DK, BV of
DV, NK and NV blocks, L tokens of all rows.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.delta_chunk import factors
from linear_moe.kernels.triton.layout import segment_of


@triton.jit
def products_of_tokens(
    x_1, y_1, x_2, y_2, x1_t: tl.constexpr, y1_t: tl.constexpr, x2_t: tl.constexpr, y2_t: tl.constexpr, left,
    DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, HAS_FIRST: tl.constexpr,
):  # fmt: skip
    """x_1 y_1^T, or zeros, and x_2 y_2^T, [C, C]."""
    i_C = tl.arange(0, C)
    b_1 = tl.zeros([C, C], tl.float32)
    b_2 = tl.zeros([C, C], tl.float32)
    for block in range(0, (DV + BV - 1) // BV):
        i_V = block * BV + tl.arange(0, BV)
        mask = (i_C[:, None] < left) & ((i_V < DV) | (DV % BV == 0))[None, :]
        if HAS_FIRST:
            b_x1 = tl.load(x_1 + i_C[:, None] * x1_t + i_V[None, :], mask=mask, other=0.0)  # [C, BV]
            b_y1 = tl.load(y_1 + i_C[:, None] * y1_t + i_V[None, :], mask=mask, other=0.0)
            b_1 = tl.dot(b_x1, tl.trans(b_y1), b_1, input_precision="ieee")
        b_x2 = tl.load(x_2 + i_C[:, None] * x2_t + i_V[None, :], mask=mask, other=0.0)
        b_y2 = tl.load(y_2 + i_C[:, None] * y2_t + i_V[None, :], mask=mask, other=0.0)
        b_2 = tl.dot(b_x2, tl.trans(b_y2), b_2, input_precision="ieee")
    return b_1, b_2


@triton.jit
def reads_of_memory(
    do, dv, states, o_t: tl.constexpr, v_t: tl.constexpr, left,
    i_K, m_K, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, HAS_OUTPUT: tl.constexpr,
):  # fmt: skip
    """do S^T (or zeros) and dv S^T, [C, BK]."""
    i_C = tl.arange(0, C)
    b_oS = tl.zeros([C, BK], tl.float32)
    b_vS = tl.zeros([C, BK], tl.float32)
    for block in range(0, (DV + BV - 1) // BV):
        i_V = block * BV + tl.arange(0, BV)
        m_V = (i_V < DV) | (DV % BV == 0)
        m_v = (i_C[:, None] < left) & m_V[None, :]
        b_dv = tl.load(dv + i_C[:, None] * v_t + i_V[None, :], mask=m_v, other=0.0)  # [C, BV]
        i_ST, m_ST = i_K[None, :] * DV + i_V[:, None], m_V[:, None] & m_K[None, :]
        b_ST = tl.load(states + i_ST, mask=m_ST, other=0.0)  # [BV, BK]
        if HAS_OUTPUT:
            b_do = tl.load(do + i_C[:, None] * o_t + i_V[None, :], mask=m_v, other=0.0)
            b_oS = tl.dot(b_do, b_ST, b_oS, input_precision="ieee")
        b_vS = tl.dot(b_dv, b_ST, b_vS, input_precision="ieee")
    return b_oS, b_vS


@triton.jit
def writes_to_memory(
    e, d_states, v_t: tl.constexpr, left,
    i_K, m_K, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """e dS^T, [C, BK]."""
    i_C = tl.arange(0, C)
    b_eS = tl.zeros([C, BK], tl.float32)
    for block in range(0, (DV + BV - 1) // BV):
        i_V = block * BV + tl.arange(0, BV)
        m_V = (i_V < DV) | (DV % BV == 0)
        m_v = (i_C[:, None] < left) & m_V[None, :]
        b_e = tl.load(e + i_C[:, None] * v_t + i_V[None, :], mask=m_v, other=0.0)  # [C, BV]
        i_ST, m_ST = i_K[None, :] * DV + i_V[:, None], m_V[:, None] & m_K[None, :]
        b_dST = tl.load(d_states + i_ST, mask=m_ST, other=0.0)  # [BV, BK]
        b_eS = tl.dot(b_e, b_dST, b_eS, input_precision="ieee")
    return b_eS


@triton.jit
def sum_through(states, d_states, first, size, BLOCK: tl.constexpr, LENGTH: tl.constexpr):
    """S * dS summed over ``size`` numbers from ``first`` on, at most ``LENGTH``.

    Loaded again: a load that a product and registers share has one buffer, into which Triton (3.6, sm_90) fetches the
    next block while the product, which is asynchronous, still reads it.
    """
    b_sum = tl.zeros([BLOCK], tl.float32)
    for block in range(0, LENGTH // BLOCK):
        i = block * BLOCK + tl.arange(0, BLOCK)
        b_S = tl.load(states + first + i, mask=i < size, other=0.0).to(tl.float32)
        b_sum += b_S * tl.load(d_states + first + i, mask=i < size, other=0.0).to(tl.float32)
    return tl.sum(b_sum, 0)


@triton.jit
def beta_gradient(terms, own, beta, is_first):
    """e_j . dv_j / beta_j, left by the first of the blocks that are summed; for small beta the block's own terms.

    Both are exact, but where keys repeat, the terms are differences of large numbers; for small beta they are not.
    """
    is_small = beta < 0.001
    return tl.where(is_small, terms, tl.where(is_first, own / tl.where(is_small, 1.0, beta), 0.0))


@triton.jit
def clear_values(
    dv, token, head, num_heads: tl.constexpr, length, DV: tl.constexpr, BV: tl.constexpr, C: tl.constexpr
):
    """Zeros in ``length`` tokens of a head."""
    i_C = tl.arange(0, C)
    v_t: tl.constexpr = num_heads * DV
    for block in range(0, (DV + BV - 1) // BV):
        i_V = block * BV + tl.arange(0, BV)
        p_dv = dv + token.to(tl.int64) * v_t + head * DV + i_C[:, None] * v_t + i_V[None, :]
        nothing = tl.zeros([C, BV], tl.float32).to(dv.dtype.element_ty)
        tl.store(p_dv, nothing, mask=(i_C[:, None] < length) & (i_V[None, :] < DV))


@triton.jit(do_not_specialize=["num_tokens", "chunks_per_row", "num_documents", "num_all", "b_b"])
def delta_gradient_kernel(
    q, k, do, beta, log_decay, sums, plan,
    pairs,  # delta_pairs.py
    e, dv,  # [L, H, DV]
    states, d_states,  # [S, H, DK, DV]
    dq, dk,  # [L, H, DK]
    d_beta, d_decay,  # [NK + 1, L, H] float32; the last part is of the pairs
    num_tokens, num_heads: tl.constexpr, chunks_per_row, num_documents, num_all, scale,
    q_b, q_t: tl.constexpr, q_h, k_b, k_t: tl.constexpr, k_h,
    o_b, o_t: tl.constexpr, o_h, b_b, b_t: tl.constexpr, b_h,
    K_PER: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, DECAY: tl.constexpr, HAS_OUTPUT: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: S * H * NK."""
    NK: tl.constexpr = (DK + BK - 1) // BK
    BLOCK: tl.constexpr = 2048
    LENGTH: tl.constexpr = (BK * DV + BLOCK - 1) // BLOCK * BLOCK
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
    i_g, of_g = i_C[:, None] * g_t + i_K[None, :], token.to(tl.int64) * g_t + head * DK
    dq, dk = dq + of_g, dk + of_g
    i_token, of_part = i_C * num_heads, (i_k * tl.cast(num_all, tl.int64) + token) * num_heads + head
    d_beta, d_decay = d_beta + of_part, d_decay + of_part
    m_g, m_token = (i_C[:, None] < length) & m_K[None, :], i_C < length
    if left > 0:
        place = chunk.to(tl.int64) * num_heads + head
        tile = place * (DK * DV)
        v_t: tl.constexpr = num_heads * DV
        of_v = token.to(tl.int64) * v_t + head * DV
        do += batch * o_b + at * o_t + head.to(tl.int64) * o_h
        e, of_dv = e + of_v, dv + of_v
        m_C = i_C < left
        m_q = m_C[:, None] & m_K[None, :]
        q += batch * q_b + at * q_t + (head // K_PER).to(tl.int64) * q_h
        k += batch * k_b + at * k_t + (head // K_PER).to(tl.int64) * k_h
        p_beta = beta + batch * b_b + (at + i_C) * b_t + head.to(tl.int64) * b_h
        b_beta = tl.load(p_beta, mask=m_C, other=0.0).to(tl.float32)
        HAS_LOW: tl.constexpr = k.dtype.element_ty == tl.float32
        read, write, total, _ = factors(
            log_decay, sums, head, num_heads, token, chunk, left, DECAY, False, C, HAS_LOW
        )

        # what tokens read of the memory before the chunk
        b_dq, b_dk = reads_of_memory(
            do, of_dv, states + tile, o_t, v_t, left, i_K, m_K, DV, BK, BV, C, HAS_OUTPUT
        )
        b_dk = b_dk * -read[:, None]
        b_k = tl.load(k + i_C[:, None] * k_t + i_K[None, :], mask=m_q, other=0.0)  # [C, BK]
        if HAS_OUTPUT:
            b_q = tl.load(q + i_C[:, None] * q_t + i_K[None, :], mask=m_q, other=0.0)
            b_dq = b_dq * (read * scale)[:, None]
        if DECAY != 0:
            b_R = tl.sum(b_k.to(tl.float32) * b_dk, 1)
            if HAS_OUTPUT:
                b_R += tl.sum(b_q.to(tl.float32) * b_dq, 1)

        # what they give each other
        p_pairs = pairs + place * (2 * C * C) + i_C[:, None] * C + i_C[None, :]
        if HAS_OUTPUT:
            b_y = tl.load(p_pairs)
            b_dq = tl.dot(b_y, b_k, b_dq, input_precision="ieee")
            tl.store(dq + i_g, b_dq.to(dq.dtype.element_ty), mask=m_q)
            b_dk = tl.dot(tl.trans(b_y), b_q, b_dk, input_precision="ieee")
        b_x = tl.load(p_pairs + C * C)
        b_dk = tl.dot(b_x, b_k, b_dk, input_precision="ieee")
        b_dk = tl.dot(tl.trans(b_x), b_k, b_dk, input_precision="ieee")

        # what they leave in the memory after it: a loop of its own, since three sums at once would fill the registers
        b_eS = writes_to_memory(e, d_states + tile, v_t, left, i_K, m_K, DV, BK, BV, C)
        b_W = tl.sum(b_k.to(tl.float32) * b_eS, 1) * write
        tl.store(d_beta + i_token, beta_gradient(b_W, 0.0, b_beta, False), mask=m_C)
        if DECAY != 0:
            size = tl.minimum(BK, DK - i_k * BK) * DV
            b_log = sum_through(states + tile, d_states + tile, i_k * (BK * DV), size, BLOCK, LENGTH) * total
            is_later = i_C[:, None] >= i_C[None, :]
            b_log += tl.sum(tl.where(is_later, b_R[:, None], (b_W * b_beta)[:, None]), 0)
            tl.store(d_decay + i_token, b_log, mask=m_C)
        b_dk += b_eS * (write * b_beta)[:, None]
        tl.store(dk + i_g, b_dk.to(dk.dtype.element_ty), mask=m_q)
    else:  # after the last document; unused chunks have no tokens
        nothing, none = tl.zeros([C, BK], tl.float32), tl.zeros([C], tl.float32)
        if HAS_OUTPUT:
            tl.store(dq + i_g, nothing.to(dq.dtype.element_ty), mask=m_g)
        tl.store(dk + i_g, nothing.to(dk.dtype.element_ty), mask=m_g)
        tl.store(d_beta + i_token, none, mask=m_token)
        if DECAY != 0:
            tl.store(d_decay + i_token, none, mask=m_token)
        clear_values(dv, token, head, num_heads, (i_k == 0) * length, DV, BV, C)

# mypy: allow-untyped-defs
"""What every chunk of the delta rule knows without the memory: the inverse of its triangular system, and its scores.

    L_ij = D_ij k_i . k_j  (i > j)                 T = (I + L diag(beta))^-1
    P_ij = scale D_ij q_i . k_j beta_j  (i >= j)   D_ij = product of the decays of tokens j + 1 .. i

Stored are T - I and P, so that the unit diagonal is never rounded. The system is solved in float32: diagonal blocks of
16 by substitution, then pairs of blocks by T_21 = -T_22 A_21 T_11. Powers of L, as in a Neumann series, would be many
thousand times the inverse where keys repeat. Without q (``HAS_OUTPUT``) there are no scores.

Letters: S chunks of all documents, H heads, C tokens in a chunk, K key dim, BK >= K, L tokens of all rows.
Source: arXiv:2406.06484 section 3 (the WY form). No code was taken.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.decay_sums import chunk_decay, sums_of
from linear_moe.kernels.triton.diag_scan import chunk_factors
from linear_moe.kernels.triton.layout import segment_of


@triton.jit
def factors(
    log_decay, sums, head, num_heads, token, chunk, left, DECAY: tl.constexpr, REVERSE: tl.constexpr, C: tl.constexpr,
    HAS_LOW: tl.constexpr,
):  # fmt: skip
    """read [C], write [C], total and D [C, C] (``REVERSE``: D transposed) of decays that are scalars, or none."""
    i_C = tl.arange(0, C)
    if DECAY == 0:
        read = tl.full([C], 1.0, tl.float32)
        write, total = read, 1.0
        if REVERSE:
            pair = tl.where(i_C[:, None] <= i_C[None, :], 1.0, 0.0)
        else:
            pair = tl.where(i_C[:, None] >= i_C[None, :], 1.0, 0.0)
    else:
        high, low, last_high, last_low = chunk_decay(
            log_decay, sums_of(sums, token, chunk, 0, head, num_heads, C), head, left, DECAY, C, HAS_LOW
        )
        read, write, pair = chunk_factors(high, low, last_high, last_low, 1.0, False, HAS_LOW)
        if REVERSE:
            _, _, pair = chunk_factors(high, low, last_high, last_low, 1.0, True, HAS_LOW)
        total = tl.exp2(last_high)
    return read, write, total, pair


@triton.jit
def diagonal_blocks(a, C: tl.constexpr, B: tl.constexpr):
    """[C, C] to the [C / B, B, B] blocks on its diagonal."""
    N: tl.constexpr = C // B
    n = tl.arange(0, N)
    is_diagonal = n[:, None, None, None] == n[None, None, :, None]
    return tl.sum(tl.where(is_diagonal, tl.reshape(a, (N, B, N, B)), 0.0), 2)


@triton.jit
def row_halves(x, N: tl.constexpr, B: tl.constexpr, WIDTH: tl.constexpr):
    """The upper and the lower rows, [N, B, WIDTH], of each of N matrices of 2 B rows."""
    return tl.split(tl.permute(tl.reshape(x, (N, 2, B, WIDTH)), (0, 2, 3, 1)))


@triton.jit
def merge(a, x, C: tl.constexpr, B: tl.constexpr, PRECISION: tl.constexpr):
    """Inverses x of the [C / B, B, B] diagonal blocks of I + a to those of blocks twice as large."""
    N: tl.constexpr = C // (2 * B)
    half = tl.arange(0, 2)
    left_columns = tl.where(
        half[None, None, :, None] == 0, tl.reshape(diagonal_blocks(a, C, 2 * B), (N, 2 * B, 2, B)), 0.0
    )
    _, below = row_halves(tl.sum(left_columns, 2), N, B, B)
    left, right = row_halves(x, N, B, B)
    if N == 1:
        flat = tl.dot(tl.reshape(below, (B, B)), tl.reshape(left, (B, B)), input_precision=PRECISION)
        flat = tl.dot(tl.reshape(right, (B, B)), flat, input_precision=PRECISION)
        below = tl.reshape(flat, (N, B, B))
    else:
        below = tl.dot(right, tl.dot(below, left, input_precision=PRECISION), input_precision=PRECISION)
    of_left = half[None, None, :, None] == 0
    upper = tl.where(of_left, left[:, :, None, :], 0.0)  # [N, B, 2, B]
    lower = tl.where(of_left, -below[:, :, None, :], right[:, :, None, :])
    is_upper = half[None, :, None, None, None] == 0
    return tl.reshape(tl.where(is_upper, upper[:, None], lower[:, None]), (N, 2 * B, 2 * B))


@triton.jit
def unit_lower_inverse(a, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + a)^-1, float32, of a strictly lower triangular [C, C]; C is 16, 32 or 64."""
    blocks = diagonal_blocks(a, C, 16)
    i = tl.arange(0, 16)
    span = i[:, None] ^ i[None, :]
    is_below = i[:, None] > i[None, :]
    x = tl.zeros_like(blocks) + tl.where(span == 0, 1.0, 0.0)[None]
    x -= tl.where((is_below & (span < 2))[None], blocks, 0.0)
    for level in tl.static_range(1, 4):
        is_pair = is_below & (span >= 2**level) & (span < 2 ** (level + 1))
        between = tl.where(is_pair[None], blocks, 0.0)
        x -= tl.dot(x, tl.dot(between, x, input_precision=PRECISION), input_precision=PRECISION)
    if C >= 32:
        x = merge(a, x, C, 16, PRECISION)
    if C >= 64:
        x = merge(a, x, C, 32, PRECISION)
    return tl.reshape(x, (C, C))


@triton.jit(do_not_specialize=["num_tokens", "chunks_per_row", "num_documents", "b_b"])
def delta_solve_kernel(
    q, k, beta, log_decay, sums, plan,
    inverse, scores,  # [S, H, C, C] in the dtype of q: T - I, and P
    num_tokens, num_heads: tl.constexpr, chunks_per_row, num_documents, scale,
    q_b, q_t: tl.constexpr, q_h, k_b, k_t: tl.constexpr, k_h, b_b, b_t: tl.constexpr, b_h,
    K_PER: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, PRECISION: tl.constexpr, HAS_OUTPUT: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: S * H."""
    head, chunk = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    row, start, _length, left = segment_of(
        plan, chunk, num_tokens, C, chunks_per_row, num_documents, IS_PACKED
    )
    if left > 0:
        i_C, i_K = tl.arange(0, C), tl.arange(0, BK)
        batch, first = row.to(tl.int64), start.to(tl.int64)
        q += batch * q_b + first * q_t + (head // K_PER).to(tl.int64) * q_h
        k += batch * k_b + first * k_t + (head // K_PER).to(tl.int64) * k_h
        m_C, m_K = i_C < left, (i_K < DK) | (DK == BK)
        m_q = m_C[:, None] & m_K[None, :]
        b_k = tl.load(k + i_C[:, None] * k_t + i_K[None, :], mask=m_q, other=0.0)  # [C, BK]
        p_beta = beta + batch * b_b + (first + i_C) * b_t + head.to(tl.int64) * b_h
        b_beta = tl.load(p_beta, mask=m_C, other=0.0).to(tl.float32)
        token = row * num_tokens + start
        HAS_LOW: tl.constexpr = k.dtype.element_ty == tl.float32
        _, _, _, pair = factors(
            log_decay, sums, head, num_heads, token, chunk, left, DECAY, False, C, HAS_LOW
        )
        pair = pair * b_beta[None, :]
        p_tile = (chunk.to(tl.int64) * num_heads + head) * (C * C) + i_C[:, None] * C + i_C[None, :]
        if HAS_OUTPUT:
            b_q = tl.load(q + i_C[:, None] * q_t + i_K[None, :], mask=m_q, other=0.0)  # [C, BK]
            b_scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * pair * scale
            tl.store(scores + p_tile, b_scores.to(scores.dtype.element_ty))
        b_a = tl.dot(b_k, tl.trans(b_k), input_precision="ieee") * pair
        is_below = i_C[:, None] > i_C[None, :]
        b_x = unit_lower_inverse(tl.where(is_below, b_a, 0.0), C, PRECISION)
        tl.store(inverse + p_tile, tl.where(is_below, b_x, 0.0).to(inverse.dtype.element_ty))

# mypy: allow-untyped-defs
"""Gradients of what documents leave in an empty memory: one walk over every segment, forward in time.

    S = sum_j w_j z_j^T,  w_j = f_j * y_j,  f_j = 2^(A_end - A_j)      over the tokens j of a document
    dy_j = f_j * (dS z_j),    dz_j = dS^T w_j,    d log a_t = d total + sum_{j < t} y_j * dy_j

dS is the gradient of the memory after the document, which nothing reads on the way: no gradient is carried. The
exponent of f_j is a sum over later tokens of the chunk and one over later chunks (``after`` of segment_state.py). The
sum over earlier tokens starts in each segment from f * (S before it) * dS, and is never a difference: tokens of long
ago, whose share is small, get a decay gradient as exact as the last ones.

Letters: as in segment_state.py, L tokens of all rows.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.diag_levels import halves, load_log_decay
from linear_moe.kernels.triton.layout import chunk_slot, mask_if, segment_of
from linear_moe.kernels.triton.segment_state import scalar_log_decay, sum_of_later


@triton.jit
def sum_by(is_summed, x, dtype: tl.constexpr):
    """[C, BD]: float32 sums of x over tokens by a matrix of 0 and 1."""
    high, low = halves(x, dtype)
    total = tl.dot(is_summed, high, input_precision="ieee")
    if dtype != tl.float32:
        total = tl.dot(is_summed, low, total, input_precision="ieee")
    return total


@triton.jit
def shared_by_memory(
    before, d_final, m_D, D: tl.constexpr, Z: tl.constexpr, BD: tl.constexpr, BZ: tl.constexpr,
    S_D: tl.constexpr, S_Z: tl.constexpr,
):  # fmt: skip
    """[BD]: S * dS summed over Z."""
    i_D = tl.arange(0, BD)
    b_sum = tl.zeros([BD], tl.float32)
    for block in range(0, (Z + BZ - 1) // BZ):
        i_Z = block * BZ + tl.arange(0, BZ)
        i_S = i_D[:, None] * S_D + i_Z[None, :] * S_Z
        m_S = m_D[:, None] & ((i_Z < Z) | (Z % BZ == 0))[None, :]
        b_S = tl.load(before + i_S, mask=m_S, other=0.0)
        b_sum += tl.sum(b_S * tl.load(d_final + i_S, mask=m_S, other=0.0), 1)
    return b_sum


@triton.jit(do_not_specialize=["num_tokens", "segments_per_row", "num_documents"])
def segment_gradient_kernel(
    y, z, log_decay, plan,
    d_final,  # [N, H, D, Z] float32 (strides S_D, S_Z)
    before,  # [S, H, D, Z] float32 (the same): the memory before each segment
    totals, after,  # [M, H, W] float32
    d_total,  # [N, H, W] float32
    dy,  # [L, H, D]
    dz,  # [L, H, Z]
    d_log,  # [L, H, W] float32; [S, H] for a decay per head
    num_tokens, num_heads: tl.constexpr, segment_size, segments_per_row, num_documents,
    y_b, y_h, z_b, z_h, a_b, a_h,
    y_t: tl.constexpr, z_t: tl.constexpr, a_t: tl.constexpr, a_d: tl.constexpr,
    Y_PER: tl.constexpr, Z_PER: tl.constexpr, D: tl.constexpr, Z: tl.constexpr, BD: tl.constexpr, BZ: tl.constexpr,
    C: tl.constexpr, S_D: tl.constexpr, S_Z: tl.constexpr, DECAY: tl.constexpr,
    HAS_BEFORE: tl.constexpr, HAS_DECAY_GRADIENT: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: S * H. BD >= D."""
    W: tl.constexpr = D if DECAY == 3 else 1
    dtype: tl.constexpr = y.dtype.element_ty
    head, segment = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    row, start, length, readable = segment_of(
        plan, segment, num_tokens, segment_size, segments_per_row, num_documents, IS_PACKED
    )
    document = row
    if IS_PACKED:
        document = tl.minimum(tl.load(plan + segment * 3 + 2), num_documents - 1)
    i_C, i_D = tl.arange(0, C), tl.arange(0, BD)
    m_D = (i_D < D) | (D == BD)
    row, first = row.to(tl.int64), start.to(tl.int64)
    token = row * num_tokens + start
    y += row * y_b + first * y_t + (head // Y_PER).to(tl.int64) * y_h
    z += row * z_b + first * z_t + (head // Z_PER).to(tl.int64) * z_h
    if DECAY >= 2:
        log_decay += row * a_b + first * a_t + head.to(tl.int64) * a_h
    of_document = document.to(tl.int64) * num_heads + head
    d_final += of_document * (D * Z)
    dy += (token * num_heads + head) * D
    dz += (token * num_heads + head) * Z
    i_W = i_D if DECAY == 3 else i_D * 0
    m_W = mask_if(m_D, readable > 0)
    is_later = tl.where(i_C[:, None] < i_C[None, :], 1.0, 0.0).to(dtype)  # [j, t]
    is_earlier = tl.where(i_C[:, None] > i_C[None, :], 1.0, 0.0).to(dtype)  # [t, j]

    # what earlier tokens add to d log a, in each row and, where all decay alike, in all rows
    b_run, run, of_head = tl.zeros([BD], tl.float32), 0.0, 0.0
    if HAS_DECAY_GRADIENT:
        if HAS_BEFORE:
            i_log = (chunk_slot(token, segment, 0, C) * num_heads + head) * W + i_W
            b_log = tl.load(totals + i_log, mask=m_W, other=0.0) + tl.load(after + i_log, mask=m_W, other=0.0)
            at = (segment.to(tl.int64) * num_heads + head) * (D * Z)
            b_run = shared_by_memory(before + at, d_final, m_W, D, Z, BD, BZ, S_D, S_Z) * tl.exp2(b_log)
        if DECAY == 3:
            b_run += tl.load(d_total + of_document * W + i_W, mask=m_W, other=0.0)
        else:
            run = tl.sum(b_run, 0) + tl.load(d_total + of_document, mask=readable > 0, other=0.0)

    for chunk in range(0, tl.cdiv(length, C)):
        left = readable - chunk * C
        past = tl.cast(chunk, tl.int64) * C
        m_C = i_C < left
        m_y, m_out = m_C[:, None] & m_D[None, :], i_C < length - chunk * C
        b_y = tl.load(y + past * y_t + i_C[:, None] * y_t + i_D[None, :], mask=m_y, other=0.0)  # [C, BD]
        b_w = b_y
        place = (chunk_slot(token, segment, chunk, C) * num_heads + head) * W
        if DECAY == 3:
            p_a = log_decay + past * a_t + i_C[:, None] * a_t + i_D[None, :] * a_d
            to_end = sum_by(is_later, load_log_decay(p_a, m_y), dtype)
            b_after = tl.load(after + place + i_D, mask=m_W, other=0.0)
            factor = tl.exp2(to_end + b_after[None, :])  # [C, BD]
            b_w = (b_y.to(tl.float32) * factor).to(dtype)
        elif DECAY != 0:
            log_a = scalar_log_decay(log_decay + (past * a_t if DECAY == 2 else 0), head, a_t, left, DECAY, C)
            later = tl.load(after + place, mask=readable > 0, other=0.0)
            factor = tl.exp2(sum_of_later(log_a, C) + later)[:, None]  # [C, 1]

        b_dy = tl.zeros([C, BD], tl.float32)
        for block in range(0, (Z + BZ - 1) // BZ):
            i_Z = block * BZ + tl.arange(0, BZ)
            m_Z = (i_Z < Z) | (Z % BZ == 0)
            p_z = z + past * z_t + i_C[:, None] * z_t + i_Z[None, :]
            b_z = tl.load(p_z, mask=m_C[:, None] & m_Z[None, :], other=0.0)  # [C, BZ]
            p_dS = d_final + i_D[:, None] * S_D + i_Z[None, :] * S_Z
            high, low = halves(tl.load(p_dS, mask=m_D[:, None] & m_Z[None, :], other=0.0), dtype)  # [BD, BZ]
            b_dz = tl.dot(b_w, high, input_precision="ieee")
            if (DECAY == 1) | (DECAY == 2):
                b_dz = b_dz * factor
            p_dz = dz + (past + i_C[:, None]) * (num_heads * Z) + i_Z[None, :]
            tl.store(p_dz, b_dz.to(dtype), mask=m_out[:, None] & m_Z[None, :])
            b_dy = tl.dot(b_z, tl.trans(high), b_dy, input_precision="ieee")
            # The gradient of a decay sums all of dS, which is rounded alike in all tokens.
            if HAS_DECAY_GRADIENT and DECAY != 3 and dtype != tl.float32:
                b_dy = tl.dot(b_z, tl.trans(low), b_dy, input_precision="ieee")
        if DECAY != 0:
            b_dy = b_dy * factor
        p_dy = dy + (past + i_C[:, None]) * (num_heads * D) + i_D[None, :]
        tl.store(p_dy, b_dy.to(dtype), mask=m_out[:, None] & m_D[None, :])

        if HAS_DECAY_GRADIENT:
            # read again, since registers are short
            b_y = tl.load(y + past * y_t + i_C[:, None] * y_t + i_D[None, :], mask=m_y, other=0.0)
            b_p = b_y.to(tl.float32) * b_dy
            if DECAY == 3:
                b_d_log = tl.where(m_y, sum_by(is_earlier, b_p, dtype) + b_run[None, :], 0.0)
                p_log = d_log + ((token + past + i_C[:, None]) * num_heads + head) * D + i_D[None, :]
                tl.store(p_log, b_d_log, mask=m_out[:, None] & m_D[None, :])
                b_run += tl.sum(b_p, 0)
            else:
                p = tl.sum(b_p, 1)  # [C]
                earlier = tl.sum(tl.where(i_C[:, None] > i_C[None, :], p[None, :], 0.0), 1)
                d_token = tl.where(m_C, earlier + run, 0.0)
                if DECAY == 1:
                    of_head += tl.sum(d_token, 0)
                else:
                    tl.store(d_log + (token + past + i_C) * num_heads + head, d_token, mask=m_out)
                run += tl.sum(p, 0)
    if DECAY == 1 and HAS_DECAY_GRADIENT:
        tl.store(d_log + segment.to(tl.int64) * num_heads + head, of_head)

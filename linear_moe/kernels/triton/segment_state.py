# mypy: allow-untyped-defs
"""What segments leave in an empty memory, without any output, for every diagonal decay: one read of each input.

    local = sum_j (2^(A_end - A_j) * y_j) z_j^T        A_j: log2 of the decay from the segment's start to token j

y are the vectors along the dimension of the memory that decays, z the others: k and v where rows decay or all elements
alike, v and k where columns do, with the memory transposed by its strides. Inside a chunk 2^(..) is a sum of later log
decays, from chunk to chunk the memory decays by the chunk's total, so nothing is subtracted and no exponent is
positive. states.py carries the memory from segment to segment. The log decays of chunks, summed backward in time over
a document by ``segment_after_kernel``, are what the gradient (segment_gradient.py) needs besides the inputs.

Letters: S segments, N documents, H heads, C tokens in a chunk, D width of y, Z of z, BD and BZ blocks of them, M chunks
(``chunk_slot``), W numbers for each decay: D, or 1 where all rows decay alike. ``Y_PER`` heads share one head of y.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.decay_sums import LOG2_E, LOG_FORGET
from linear_moe.kernels.triton.diag_levels import halves, load_log_decay
from linear_moe.kernels.triton.layout import chunk_slot, mask_if, segment_of

LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def scalar_log_decay(log_decay, head, a_t: tl.constexpr, left, DECAY: tl.constexpr, C: tl.constexpr):
    """[C]: log2 a of each token, 0 where there is none; ``log_decay`` points at the chunk, or at numbers of heads."""
    i_C = tl.arange(0, C)
    if DECAY == 1:
        log_a = tl.load(log_decay + head + i_C * 0).to(tl.float32)
    else:
        log_a = tl.load(log_decay + i_C * a_t, mask=i_C < left, other=0.0).to(tl.float32)
    log_a = tl.where(log_a < LOG_FORGET, LOG_FORGET, log_a) * LOG2_E
    return tl.where(i_C < left, log_a, 0.0)


@triton.jit
def sum_of_later(log_a, C: tl.constexpr):
    """[C]: sums over the later tokens of the chunk."""
    i_C = tl.arange(0, C)
    return tl.sum(tl.where(i_C[:, None] < i_C[None, :], log_a[None, :], 0.0), 1)


@triton.jit(do_not_specialize=["num_tokens", "segments_per_row", "num_documents"])
def segment_local_kernel(
    y, z, log_decay, plan,
    local,  # [S, H, D, Z] float32 (strides S_D, S_Z)
    kept,  # [S, H, W] float32: what a segment keeps of the memory before it
    totals,  # [M, H, W] float32: log2 of what a chunk keeps
    num_tokens, num_heads: tl.constexpr, segment_size, segments_per_row, num_documents,
    y_b, y_h, z_b, z_h, a_b, a_h,
    y_t: tl.constexpr, z_t: tl.constexpr, a_t: tl.constexpr, a_d: tl.constexpr,
    Y_PER: tl.constexpr, Z_PER: tl.constexpr, D: tl.constexpr, Z: tl.constexpr, BD: tl.constexpr, BZ: tl.constexpr,
    C: tl.constexpr, S_D: tl.constexpr, S_Z: tl.constexpr, DECAY: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: S * H * blocks of D * blocks of Z. ``DECAY``: none, per head, per token, per token and row."""
    NZ: tl.constexpr = (Z + BZ - 1) // BZ
    ND: tl.constexpr = (D + BD - 1) // BD
    W: tl.constexpr = D if DECAY == 3 else 1
    i_z, i_d = tl.program_id(0) % NZ, (tl.program_id(0) // NZ) % ND
    head = (tl.program_id(0) // (NZ * ND)) % num_heads
    segment = tl.program_id(0) // (NZ * ND) // num_heads
    row, start, _, readable = segment_of(
        plan, segment, num_tokens, segment_size, segments_per_row, num_documents, IS_PACKED
    )
    i_C, i_D, i_Z = tl.arange(0, C), i_d * BD + tl.arange(0, BD), i_z * BZ + tl.arange(0, BZ)
    m_D, m_Z = (i_D < D) | (D % BD == 0), (i_Z < Z) | (Z % BZ == 0)
    row, first = row.to(tl.int64), start.to(tl.int64)
    y += row * y_b + first * y_t + (head // Y_PER).to(tl.int64) * y_h
    z += row * z_b + first * z_t + (head // Z_PER).to(tl.int64) * z_h
    if DECAY >= 2:
        log_decay += row * a_b + first * a_t + head.to(tl.int64) * a_h
    token = row * num_tokens + start
    # [t, j]: whether token t is later than j
    is_later = tl.where(i_C[:, None] > i_C[None, :], 1.0, 0.0).to(y.dtype.element_ty)

    b_S = tl.zeros([BD, BZ], tl.float32)
    b_kept, kept_of_all = tl.zeros([BD], tl.float32), 0.0  # log2
    for chunk in range(0, tl.cdiv(readable, C)):
        left = readable - chunk * C
        past = tl.cast(chunk, tl.int64) * C
        m_C = i_C < left
        m_yT = m_D[:, None] & m_C[None, :]
        b_yT = tl.load(y + past * y_t + i_D[:, None] + i_C[None, :] * y_t, mask=m_yT, other=0.0)  # [BD, C]
        p_z = z + past * z_t + i_C[:, None] * z_t + i_Z[None, :]
        b_z = tl.load(p_z, mask=m_C[:, None] & m_Z[None, :], other=0.0)  # [C, BZ]
        p_total = totals + (chunk_slot(token, segment, chunk, C) * num_heads + head) * W
        if DECAY == 3:
            p_a = log_decay + past * a_t + i_C[None, :] * a_t + i_D[:, None] * a_d
            b_a = load_log_decay(p_a, m_yT)  # [BD, C]
            high, low = halves(b_a, y.dtype.element_ty)
            to_end = tl.dot(high, is_later, input_precision="ieee")
            if y.dtype.element_ty != tl.float32:
                to_end = tl.dot(low, is_later, to_end, input_precision="ieee")
            b_yT = (b_yT.to(tl.float32) * tl.exp2(to_end)).to(b_yT.dtype)
            b_total = tl.sum(b_a, 1)
            tl.store(p_total + i_D, b_total, mask=mask_if(m_D, i_z == 0))
            b_S = b_S * tl.exp2(b_total)[:, None]
            b_kept += b_total
        elif DECAY != 0:
            log_a = scalar_log_decay(log_decay + (past * a_t if DECAY == 2 else 0), head, a_t, left, DECAY, C)
            b_z = (b_z.to(tl.float32) * tl.exp2(sum_of_later(log_a, C))[:, None]).to(b_z.dtype)
            total = tl.sum(log_a, 0)
            tl.store(p_total, total, mask=(i_z == 0) & (i_d == 0))
            b_S = b_S * tl.exp2(total)
            kept_of_all += total
        b_S = tl.dot(b_yT, b_z, b_S, input_precision="ieee")  # [BD, BZ]

    at = segment.to(tl.int64) * num_heads + head
    p_S = local + at * (D * Z) + i_D[:, None] * S_D + i_Z[None, :] * S_Z
    tl.store(p_S, b_S, mask=m_D[:, None] & m_Z[None, :])
    if DECAY == 3:
        tl.store(kept + at * D + i_D, tl.exp2(b_kept), mask=mask_if(m_D, i_z == 0))
    elif DECAY != 0:
        tl.store(kept + at, tl.exp2(kept_of_all), mask=(i_z == 0) & (i_d == 0))


@triton.jit(do_not_specialize=["num_tokens", "segments_per_row"])
def segment_after_kernel(
    totals,  # [M, H, W]: log2 of what each chunk keeps; 0 in places without a chunk
    after,  # [M, H, W]: the same of all later chunks of its document
    total,  # [N, H, W]: natural log of what the document keeps
    plan, first_segment,
    num_tokens, num_heads: tl.constexpr, segment_size, segments_per_row,
    W: tl.constexpr, BW: tl.constexpr, BM: tl.constexpr, C: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: N * H * blocks of W. All float32; from the end of a document to its start."""
    NW: tl.constexpr = (W + BW - 1) // BW
    i_W = (tl.program_id(0) % NW) * BW + tl.arange(0, BW)
    head = (tl.program_id(0) // NW) % num_heads
    document = tl.program_id(0) // NW // num_heads
    if IS_PACKED:
        first = tl.load(first_segment + document)
        last = tl.load(first_segment + document + 1) - 1
        is_some = last >= first
        start = tl.load(plan + first * 3, mask=is_some, other=0)
        last_start = tl.load(plan + last * 3, mask=is_some, other=0)
        last_length = tl.load(plan + last * 3 + 1, mask=is_some, other=0)
    else:
        first, last = document * segments_per_row, (document + 1) * segments_per_row - 1
        start = document * num_tokens
        last_start = start + (segments_per_row - 1) * segment_size
        last_length = start + num_tokens - last_start
    begin = chunk_slot(start, first, 0, C)
    end = chunk_slot(last_start, last, tl.cdiv(last_length, C), C)
    if IS_PACKED:
        end = tl.where(is_some, end, begin)

    m_W = i_W < W
    b_sum = tl.zeros([BW], tl.float32)
    for step in range(0, tl.cdiv(end - begin, BM)):
        i_M = end - (step + 1) * BM + tl.arange(0, BM)
        is_chunk = i_M >= begin
        i_tile = (i_M[:, None].to(tl.int64) * num_heads + head) * W + i_W[None, :]
        m_next = (is_chunk & (i_M + 1 < end))[:, None] & m_W[None, :]
        # [BM, BW], of the chunk after
        b_next = tl.load(totals + num_heads * W + i_tile, mask=m_next, other=0.0)
        b_after = tl.cumsum(b_next, 0, reverse=True) + b_sum[None, :]
        tl.store(after + i_tile, b_after, mask=is_chunk[:, None] & m_W[None, :])
        b_sum += tl.sum(b_next, 0)
    p_first = totals + (begin.to(tl.int64) * num_heads + head) * W + i_W
    b_sum += tl.load(p_first, mask=mask_if(m_W, end > begin), other=0.0)
    tl.store(total + (document.to(tl.int64) * num_heads + head) * W + i_W, b_sum * LN_2, mask=m_W)

# mypy: allow-untyped-defs
"""The one kernel behind the fused diagonal-decay scan: the output and every gradient is a run of it.

    o = read * (q S) + (scores(q k^T) * pair) v,    S <- total * S + k^T (write * v)          chunk by chunk

Its runs differ in who reads, who writes, and the direction of time (docs/kernels.md derives them):

    run    q    k    v    S                         direction    x
    o      q    k    v    memory                    forward
    dq     do   v    k    memory, transposed        forward      q
    dv     k    q    do   gradient of the memory    backward
    dk     v    do   q    the same, transposed      backward     k

A program owns one segment, one head and BV columns of S, which never leaves the chip. With g the log2 of the decay
summed from the start of the chunk, the factors are, forward, read = 2^g_i, write = 2^(g_last - g_j) and
pair = 2^(g_i - g_j) for i >= j; backward, read = 2^(g_last - g_i), write = 2^g_j and pair = 2^(g_j - g_i) for i <= j;
total = 2^g_last. No exponent is positive. ``scale`` is in pair and read forward, in pair and write backward.

Where the decay has a gradient (``GRADIENT``), dq and dk also leave the sums that decay_sums.py puts together; o leaves
S before every ``EVERY``-th chunk, counted from the end, to meet its gradient there in the run of dk.

Every tile is loaded in the orientation in which it is used, and no product of matrices is transposed: Triton 3.4 to
3.7.0 miscompiles that as the first factor of another product on Hopper (fla-org/flash-linear-attention#826).

Letters: C tokens in a chunk, DK width of q and k, DV of v and o, BK >= DK, BV a block of DV, NV blocks of it, H heads,
L tokens of all rows, S segments, G groups of ``EVERY`` chunks of all of them. ``Q_PER`` heads of the scan share one
head of q.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.decay_sums import chunk_decay, sums_of
from linear_moe.kernels.triton.layout import chunk_slot, mask_if, segment_of


@triton.jit
def chunk_factors(
    high, low, last_high, last_low, scale, REVERSE: tl.constexpr, HAS_LOW: tl.constexpr = True, zero=0
):  # fmt: skip
    """read [C], write [C] and pair [C, C] of one chunk; pair of the wrong order is 0, masked before exp2.

    A ``zero`` that the compiler does not know for one keeps it from holding a register for each number of a column.
    """
    i_C = tl.arange(0, high.shape[0])
    i_J = i_C + zero
    to_end, from_start, span = last_high - high, high, high[:, None] - high[None, :]
    if HAS_LOW:
        to_end, from_start, span = to_end + (last_low - low), high + low, span + (low[:, None] - low[None, :])
    to_end, from_start = tl.exp2(to_end), tl.exp2(from_start)
    if REVERSE:
        read, write = to_end, from_start * scale
        pair = tl.exp2(tl.where(i_C[:, None] <= i_J[None, :], -span, float("-inf"))) * scale
    else:
        read, write = from_start * scale, to_end
        pair = tl.exp2(tl.where(i_C[:, None] >= i_J[None, :], span, float("-inf"))) * scale
    return read, write, pair


@triton.jit
def of_memory(b_q, b_S, read, scale, DECAY: tl.constexpr, REVERSE: tl.constexpr):
    """What the tokens of a chunk read of the memory before it, [C, BV] float32."""
    b_o = tl.dot(b_q, b_S.to(b_q.dtype), input_precision="ieee")
    if DECAY != 0:
        b_o = b_o * read[:, None]
    elif not REVERSE:
        b_o = b_o * scale
    return b_o


@triton.jit(do_not_specialize=["num_tokens", "segments_per_row", "num_documents", "num_all", "num_groups"])
def diag_scan_kernel(
    q, k, v, o, x, log_decay, sums, plan,
    before,  # [S, H, DK, DV] float32 (strides S_K, S_V): what S starts from, or nothing
    final,  # the same: what S ends with
    saved,  # [G, H, DK, DV] (strides S_K, S_V): S before every EVERY-th chunk, counted from the end
    inter_sums,  # [NV, H, L] float32
    through,  # [NV, G, H] float32
    num_tokens, num_heads: tl.constexpr, segment_size, segments_per_row, num_documents, num_groups, num_all, scale,
    q_b, q_h, k_b, k_h, v_b, v_h, o_b, o_h, x_b, x_h,
    q_t: tl.constexpr, k_t: tl.constexpr, v_t: tl.constexpr, o_t: tl.constexpr, x_t: tl.constexpr,
    Q_PER: tl.constexpr, K_PER: tl.constexpr, V_PER: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    S_K: tl.constexpr, S_V: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr,
    GRADIENT: tl.constexpr, EVERY: tl.constexpr,
    HAS_BEFORE: tl.constexpr, STORE_FINAL: tl.constexpr, STORE_SAVED: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: S * H * NV; the blocks of one head are neighbours, so that the second finds q and k in L2."""
    NV: tl.constexpr = (DV + BV - 1) // BV
    AHEAD: tl.constexpr = (
        DECAY == 2 and REVERSE and GRADIENT == 0
    )  # G is loaded a chunk ahead: nothing else hides it
    IS_EARLY: tl.constexpr = GRADIENT == 1 and BV >= 64  # reads the memory before the scores
    HAS_LOW: tl.constexpr = v.dtype.element_ty == tl.float32
    i_v = tl.program_id(0) % NV
    head = (tl.program_id(0) // NV) % num_heads
    segment = tl.program_id(0) // NV // num_heads
    row, start, length, readable = segment_of(
        plan, segment, num_tokens, segment_size, segments_per_row, num_documents, IS_PACKED
    )
    i_C, i_K, i_V = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    row, first = row.to(tl.int64), start.to(tl.int64)
    q += row * q_b + first * q_t + (head // Q_PER).to(tl.int64) * q_h
    k += row * k_b + first * k_t + (head // K_PER).to(tl.int64) * k_h
    v += row * v_b + first * v_t + (head // V_PER).to(tl.int64) * v_h
    o += row * o_b + first * o_t + head.to(tl.int64) * o_h
    if GRADIENT != 0:
        x += row * x_b + first * x_t + (head // V_PER).to(tl.int64) * x_h
    token = row * num_tokens + start  # of all rows
    of_sums = (i_v * num_heads + head).to(tl.int64) * num_all + token

    # whole tiles of S, by the strides of what it is stored as; known ones, or the offsets would fill the registers
    i_S = i_K[:, None] * S_K + i_V[None, :] * S_V
    m_K, m_V = (i_K < DK) | (DK == BK), (i_V < DV) | (DV % BV == 0)
    m_S = m_K[:, None] & m_V[None, :]
    at = (segment.to(tl.int64) * num_heads + head) * (DK * DV)
    b_S = tl.zeros([BK, BV], tl.float32)
    if HAS_BEFORE:
        b_S = tl.load(before + at + i_S, mask=mask_if(m_S, readable > 0), other=0.0)

    num_chunks = tl.cdiv(length, C)
    # pointers of the first chunk in time: one step each, instead of an address that is counted down for each of them
    sums = sums_of(sums, token, segment, num_chunks - 1 if REVERSE else 0, head, num_heads, C)
    if REVERSE:
        origin = tl.cast(num_chunks - 1, tl.int64) * C
        q, k, v, o = q + origin * q_t, k + origin * k_t, v + origin * v_t, o + origin * o_t
        of_sums += origin
        if GRADIENT != 0:
            x += origin * x_t
    if AHEAD:
        next_total = tl.load(sums + C - 1, mask=num_chunks > 0, other=0.0)
    for step in range(0, num_chunks):
        chunk = num_chunks - 1 - step if REVERSE else step
        left = tl.minimum(readable - chunk * C, C)
        past = tl.cast(step, tl.int64) * (-C if REVERSE else C)
        m_q = (i_C[:, None] < left) & m_K[None, :]
        m_kT = m_K[:, None] & (i_C[None, :] < left)
        m_v = (i_C[:, None] < left) & m_V[None, :]
        b_q = tl.load(q + past * q_t + i_C[:, None] * q_t + i_K[None, :], mask=m_q, other=0.0)  # [C, BK]
        b_kT = tl.load(k + past * k_t + i_K[:, None] + i_C[None, :] * k_t, mask=m_kT, other=0.0)  # [BK, C]
        b_v = tl.load(v + past * v_t + i_C[:, None] * v_t + i_V[None, :], mask=m_v, other=0.0)  # [C, BV]

        from_end = num_chunks - 1 - chunk
        group = chunk_slot(token, segment, from_end // EVERY, C * EVERY) * num_heads + head
        if STORE_SAVED and from_end % EVERY == 0:
            tl.store(saved + group * (DK * DV) + i_S, b_S.to(saved.dtype.element_ty), mask=m_S)

        b_write, read = b_v, scale
        if DECAY != 0:
            high, low, last_high, last_low = chunk_decay(
                log_decay, sums + past * (2 * num_heads), head, left, DECAY, C, HAS_LOW
            )  # fmt: skip
            if AHEAD:
                last_high = next_total
                ahead = tl.cast(tl.minimum(step + 1, num_chunks - 1), tl.int64) * -C
                next_total = tl.load(sums + ahead * (2 * num_heads) + C - 1)
            zero = tl.minimum(left, 0) if IS_EARLY else 0  # without tokens all is 0
            read, write, pair = chunk_factors(
                high, low, last_high, last_low, scale, REVERSE, HAS_LOW, zero
            )  # fmt: skip
            b_write = (b_v * write[:, None]).to(b_v.dtype)
        elif REVERSE:
            b_write = (b_v * scale).to(b_v.dtype)

        # b_x ends before the scores begin, or the scores' exponents before b_o: together they do not fit the registers
        if IS_EARLY:
            b_o = of_memory(b_q, b_S, read, scale, DECAY, REVERSE)
            b_x = tl.load(x + past * x_t + i_C[:, None] * x_t + i_V[None, :], mask=m_v, other=0.0)  # [C, BV]
            b_inter = tl.sum(b_o * b_x.to(tl.float32), 1)
        b_scores = tl.dot(b_q, b_kT, input_precision="ieee")  # [C, C]
        if DECAY != 0:
            b_scores = b_scores * pair
        elif REVERSE:
            b_scores = tl.where(i_C[:, None] <= i_C[None, :], b_scores * scale, 0.0)
        else:
            b_scores = tl.where(i_C[:, None] >= i_C[None, :], b_scores * scale, 0.0)
        if GRADIENT != 0 and not IS_EARLY:
            b_x = tl.load(x + past * x_t + i_C[:, None] * x_t + i_V[None, :], mask=m_v, other=0.0)  # [C, BV]
        b_rounded = b_scores.to(b_v.dtype)
        if not IS_EARLY:
            b_o = of_memory(b_q, b_S, read, scale, DECAY, REVERSE)
        if GRADIENT != 0 and not IS_EARLY:
            b_inter = tl.sum(b_o * b_x.to(tl.float32), 1)
        if GRADIENT == 2:
            tl.store(inter_sums + of_sums + past + i_C, b_inter, mask=i_C < left)
        b_o = tl.dot(b_rounded, b_v, b_o, input_precision="ieee")
        m_o = (chunk * C + i_C[:, None] < length) & m_V[None, :]
        tl.store(o + past * o_t + i_C[:, None] * o_t + i_V[None, :], b_o.to(o.dtype.element_ty), mask=m_o)
        if GRADIENT == 1:
            b_pairs = tl.dot(b_x, tl.trans(b_v), input_precision="ieee")  # [C, C], of loaded tiles
            b_pairs = tl.where(i_C[:, None] > i_C[None, :], b_pairs * b_scores, 0.0)
            b_inter += tl.sum(b_pairs, 1) - tl.sum(b_pairs, 0)
            tl.store(inter_sums + of_sums + past + i_C, b_inter, mask=i_C < left)

        if DECAY != 0:
            b_S = b_S * tl.exp2(last_high)
        if GRADIENT == 2 and from_end % EVERY == 0:
            # b_S has decayed through the chunk, which has not written yet
            b_saved = tl.load(saved + group * (DK * DV) + i_S, mask=m_S, other=0.0).to(tl.float32)
            part = (i_v * num_groups).to(tl.int64) * num_heads
            tl.store(through + part + group, tl.sum(b_S * b_saved))
        b_S = tl.dot(b_kT, b_write, b_S, input_precision="ieee")  # [BK, BV]

    if STORE_FINAL:
        tl.store(final + at + i_S, b_S, mask=m_S)

# mypy: allow-untyped-defs
"""The two scans of the delta rule over the chunks of a document: the memory forward, its gradient backward in time.

    e = T (v - read * (K S))            S  <- total * S + K^T (write * beta * e)           forward, e is kept
    x = P^T do + write * beta * (K dS)  dv = T^T x
    dS <- total * dS + Q^T (scale * read * do) - K^T (read * dv)                           backward

e_t = v_t - (a_t S_{t-1})^T k_t is what the memory got wrong before token t wrote; T and P come from delta_chunk.py.
Three dependent products a step, no other work: everything else of the operation is parallel over chunks. A program
owns one document, one head and BV columns of S, which never leaves the chip except in the dtype of the inputs, once
for each chunk: what the other kernels read.

With a vector decay (``DECAY == 3``) read and write are in the rows of K and Q that it is given, total is a vector.

Long rows of few heads are cut in pieces, which the kernels treat as documents. What a piece does to a memory,
S -> M S + N, is the same scan with nothing kept but its end (``ONLY_FINAL``): N from an empty memory, M from the
identity without v. Where nothing reads the memory but its end (delta_segment.py), the gradient's scan has no do, q and
scores (``HAS_OUTPUT``).

Letters: S chunks of all documents, N documents (pieces), H heads, C tokens in a chunk, DK and DV the dims of k and v,
BK >= DK, BV a block of DV, NV blocks of it, L tokens of all rows.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.decay_sums import chunk_decay, sums_of
from linear_moe.kernels.triton.diag_scan import chunk_factors


@triton.jit
def document_of(
    plan, first_chunk, document, num_tokens, chunks_per_row, pieces, C: tl.constexpr, IS_PACKED: tl.constexpr
):  # fmt: skip
    """Row, first token, tokens, first chunk and number of chunks of a document; of rows, one of their pieces."""
    if IS_PACKED:
        row = document * 0
        first = tl.load(first_chunk + document)
        count = tl.load(first_chunk + document + 1) - first
        last = first + count - 1
        start = tl.load(plan + first * 3, mask=count > 0, other=0)
        end = tl.load(plan + last * 3, mask=count > 0, other=0)
        length = end + tl.load(plan + last * 3 + 1, mask=count > 0, other=0) - start
    else:
        row, piece = document // pieces, document % pieces
        size = tl.cdiv(chunks_per_row, pieces)
        start = piece * size * C
        length = tl.maximum(tl.minimum(num_tokens - start, size * C), 0)
        first, count = row * chunks_per_row + piece * size, tl.cdiv(length, C)
    return row, start, length, first, count


@triton.jit
def load_gates(
    beta, log_decay, sums, head, num_heads, token, step, count, length, first, b_t,
    DECAY: tl.constexpr, C: tl.constexpr, HAS_LOW: tl.constexpr,
):  # fmt: skip
    """beta [C] of a step, and what it knows of its decay; of no step, numbers that nobody uses.

    Triton does not fetch numbers like these ahead: a scan loads them during the step before.
    """
    i_C = tl.arange(0, C)
    step = tl.maximum(tl.minimum(step, count - 1), 0)
    left, past = length - step * C, tl.cast(step, tl.int64) * C
    b_beta = tl.load(beta + past * b_t + i_C * b_t, mask=i_C < left, other=0.0)
    chunk = tl.where(count > 0, first + step, 0)
    high, low, last_high, last_low = 0.0, 0.0, 0.0, 0.0
    if (DECAY == 1) | (DECAY == 2):
        p_sums = sums_of(sums, tl.where(count > 0, token + past, 0), chunk, 0, head, num_heads, C)
        high, low, last_high, last_low = chunk_decay(log_decay, p_sums, head, left, DECAY, C, HAS_LOW)
    return b_beta, high, low, last_high, last_low


@triton.jit
def step_factors(
    gates, totals, tile, i_K, DK: tl.constexpr, BK: tl.constexpr, DECAY: tl.constexpr, C: tl.constexpr,
    HAS_LOW: tl.constexpr,
):  # fmt: skip
    """read [C], write * beta [C] and total [BK] of a step."""
    b_beta, high, low, last_high, last_low = gates
    read, write = tl.full([C], 1.0, tl.float32), b_beta.to(tl.float32)
    total = tl.full([BK], 1.0, tl.float32)
    if DECAY == 3:
        total = tl.load(totals + tile * DK + i_K, mask=(i_K < DK) | (DK == BK), other=0.0)
    elif DECAY != 0:
        read, to_end, _ = chunk_factors(high, low, last_high, last_low, 1.0, False, HAS_LOW)
        write = write * to_end
        total *= tl.exp2(last_high)
    return read, write, total


@triton.jit(do_not_specialize=["num_tokens", "chunks_per_row", "pieces", "b_b"])
def delta_forward_kernel(
    k_read, k_write, v, beta, log_decay, sums, totals, inverse, plan, first_chunk,
    initial, final,  # [N, H, DK, DV] float32; initial may be nothing
    states,  # [S, H, DK, DV]: the memory before each chunk
    errors,  # [L, H, DV]: e
    num_tokens, num_heads: tl.constexpr, chunks_per_row, pieces,
    k_b, k_t: tl.constexpr, k_h, w_b, w_t: tl.constexpr, w_h,
    v_b, v_t: tl.constexpr, v_h, b_b, b_t: tl.constexpr, b_h,
    K_PER: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, DECAY: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_V: tl.constexpr, ONLY_FINAL: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: N * H * NV; the blocks of one head are neighbours, so that the second finds k in L2."""
    NV: tl.constexpr = (DV + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    head = (tl.program_id(0) // NV) % num_heads
    document = tl.program_id(0) // NV // num_heads
    row, start, length, first, count = document_of(
        plan, first_chunk, document, num_tokens, chunks_per_row, pieces, C, IS_PACKED
    )
    i_C, i_K, i_V = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    batch, at = row.to(tl.int64), start.to(tl.int64)
    token = row * num_tokens + start
    k_read += batch * k_b + at * k_t + (head // K_PER).to(tl.int64) * k_h
    k_write += batch * w_b + at * w_t + (head // K_PER).to(tl.int64) * w_h
    v += batch * v_b + at * v_t + head.to(tl.int64) * v_h
    beta += batch * b_b + at * b_t + head.to(tl.int64) * b_h
    e_t: tl.constexpr = num_heads * DV
    errors += token.to(tl.int64) * e_t + head * DV

    m_K, m_V = (i_K < DK) | (DK == BK), (i_V < DV) | (DV % BV == 0)
    m_S, i_S = m_K[:, None] & m_V[None, :], i_K[:, None] * DV + i_V[None, :]
    of_document = (document.to(tl.int64) * num_heads + head) * (DK * DV)
    b_S = tl.zeros([BK, BV], tl.float32)
    if HAS_INITIAL:
        b_S = tl.load(initial + of_document + i_S, mask=m_S, other=0.0)

    HAS_LOW: tl.constexpr = k_read.dtype.element_ty == tl.float32
    gates = load_gates(
        beta, log_decay, sums, head, num_heads, token, 0, count, length, first, b_t, DECAY, C, HAS_LOW
    )  # fmt: skip
    for step in range(0, count):
        left = length - step * C
        past = tl.cast(step, tl.int64) * C
        m_C = i_C < left
        chunk = first + step
        tile = tl.cast(chunk, tl.int64) * num_heads + head
        b_k = tl.load(
            k_read + past * k_t + i_C[:, None] * k_t + i_K[None, :],
            mask=m_C[:, None] & m_K[None, :],
            other=0.0,
        )  # [C, BK]
        b_kT = tl.trans(b_k)  # [BK, C]
        if DECAY == 3:
            b_kT = tl.load(
                k_write + past * w_t + i_K[:, None] + i_C[None, :] * w_t,
                mask=m_K[:, None] & m_C[None, :],
                other=0.0,
            )
        m_v = m_C[:, None] & m_V[None, :]
        b_v = tl.zeros([C, BV], tl.float32)
        if HAS_V:
            p_v = v + past * v_t + i_C[:, None] * v_t + i_V[None, :]
            b_v = tl.load(p_v, mask=m_v, other=0.0).to(tl.float32)  # [C, BV]
        b_T = tl.load(inverse + tile * (C * C) + i_C[:, None] * C + i_C[None, :])  # [C, C]
        read, write, total = step_factors(gates, totals, tile, i_K, DK, BK, DECAY, C, HAS_LOW)
        gates = load_gates(
            beta, log_decay, sums, head, num_heads, token, step + 1, count, length, first, b_t, DECAY, C, HAS_LOW
        )  # fmt: skip
        b_state = b_S.to(b_k.dtype)
        if not ONLY_FINAL:
            tl.store(states + tile * (DK * DV) + i_S, b_state, mask=m_S)
        b_y = b_v - tl.dot(b_k, b_state, input_precision="ieee") * read[:, None]
        b_e = tl.dot(b_T, b_y.to(b_T.dtype), b_y, input_precision="ieee")  # [C, BV]
        if not ONLY_FINAL:
            p_e = errors + past * e_t + i_C[:, None] * e_t + i_V[None, :]
            tl.store(p_e, b_e.to(errors.dtype.element_ty), mask=m_v)
        b_w = b_e * write[:, None]
        b_high = b_w.to(b_kT.dtype)
        b_S = tl.dot(b_kT, b_high, b_S * total[:, None], input_precision="ieee")
        if b_kT.dtype != tl.float32:  # of a memory that hardly fades, every rounded write stays
            b_low = (b_w - b_high.to(tl.float32)).to(b_kT.dtype)
            b_S = tl.dot(b_kT, b_low, b_S, input_precision="ieee")
    tl.store(final + of_document + i_S, b_S, mask=m_S)


@triton.jit(do_not_specialize=["num_tokens", "chunks_per_row", "pieces", "b_b"])
def delta_backward_kernel(
    q_read, k_read, k_write, do, beta, log_decay, sums, totals, inverse, scores, plan, first_chunk,
    d_final, d_initial,  # [N, H, DK, DV] float32; d_final may be nothing
    d_states,  # [S, H, DK, DV]: the gradient of the memory after each chunk
    dv,  # [L, H, DV]
    num_tokens, num_heads: tl.constexpr, chunks_per_row, pieces, scale,
    q_b, q_t: tl.constexpr, q_h, k_b, k_t: tl.constexpr, k_h, w_b,
    w_t: tl.constexpr, w_h, o_b, o_t: tl.constexpr, o_h, b_b, b_t: tl.constexpr, b_h,
    K_PER: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, DECAY: tl.constexpr, HAS_FINAL: tl.constexpr,
    ONLY_INITIAL: tl.constexpr, HAS_OUTPUT: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: N * H * NV."""
    NV: tl.constexpr = (DV + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    head = (tl.program_id(0) // NV) % num_heads
    document = tl.program_id(0) // NV // num_heads
    row, start, length, first, count = document_of(
        plan, first_chunk, document, num_tokens, chunks_per_row, pieces, C, IS_PACKED
    )
    i_C, i_K, i_V = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    batch, at = row.to(tl.int64), start.to(tl.int64)
    token = row * num_tokens + start
    q_read += batch * q_b + at * q_t + (head // K_PER).to(tl.int64) * q_h
    k_read += batch * k_b + at * k_t + (head // K_PER).to(tl.int64) * k_h
    k_write += batch * w_b + at * w_t + (head // K_PER).to(tl.int64) * w_h
    do += batch * o_b + at * o_t + head.to(tl.int64) * o_h
    beta += batch * b_b + at * b_t + head.to(tl.int64) * b_h
    v_t: tl.constexpr = num_heads * DV
    dv += token.to(tl.int64) * v_t + head * DV

    m_K, m_V = (i_K < DK) | (DK == BK), (i_V < DV) | (DV % BV == 0)
    m_S, i_S = m_K[:, None] & m_V[None, :], i_K[:, None] * DV + i_V[None, :]
    of_document = (document.to(tl.int64) * num_heads + head) * (DK * DV)
    b_dS = tl.zeros([BK, BV], tl.float32)
    if HAS_FINAL:
        b_dS = tl.load(d_final + of_document + i_S, mask=m_S, other=0.0)

    HAS_LOW: tl.constexpr = k_read.dtype.element_ty == tl.float32
    gates = load_gates(
        beta, log_decay, sums, head, num_heads, token, count - 1, count, length, first, b_t, DECAY, C, HAS_LOW
    )  # fmt: skip
    for back in range(0, count):
        step = count - 1 - back
        left = length - step * C
        past = tl.cast(step, tl.int64) * C
        m_C = i_C < left
        chunk = first + step
        tile = tl.cast(chunk, tl.int64) * num_heads + head
        m_kT, m_v = m_K[:, None] & m_C[None, :], m_C[:, None] & m_V[None, :]
        b_k = tl.load(
            k_write + past * w_t + i_C[:, None] * w_t + i_K[None, :],
            mask=m_C[:, None] & m_K[None, :],
            other=0.0,
        )  # [C, BK]
        b_kT = tl.trans(b_k)  # [BK, C]
        if DECAY == 3:
            b_kT = tl.load(k_read + past * k_t + i_K[:, None] + i_C[None, :] * k_t, mask=m_kT, other=0.0)
        p_tile = tile * (C * C) + i_C[:, None] + i_C[None, :] * C  # transposed
        b_TT = tl.load(inverse + p_tile)  # [C, C]
        if HAS_OUTPUT:
            b_qT = tl.load(q_read + past * q_t + i_K[:, None] + i_C[None, :] * q_t, mask=m_kT, other=0.0)
            p_do = do + past * o_t + i_C[:, None] * o_t + i_V[None, :]
            b_do = tl.load(p_do, mask=m_v, other=0.0)  # [C, BV]
            b_PT = tl.load(scores + p_tile)
        read, write, total = step_factors(gates, totals, tile, i_K, DK, BK, DECAY, C, HAS_LOW)
        gates = load_gates(
            beta, log_decay, sums, head, num_heads, token, step - 1, count, length, first, b_t, DECAY, C, HAS_LOW
        )  # fmt: skip
        b_state = b_dS.to(b_k.dtype)
        if not ONLY_INITIAL:
            tl.store(d_states + tile * (DK * DV) + i_S, b_state, mask=m_S)
        b_x = tl.dot(b_k, b_state, input_precision="ieee") * write[:, None]  # [C, BV]
        if HAS_OUTPUT:
            b_x = tl.dot(b_PT, b_do, b_x, input_precision="ieee")
        b_dv = tl.dot(b_TT, b_x.to(b_TT.dtype), b_x, input_precision="ieee")
        if not ONLY_INITIAL:
            p_dv = dv + past * v_t + i_C[:, None] * v_t + i_V[None, :]
            tl.store(p_dv, b_dv.to(dv.dtype.element_ty), mask=m_v)
        b_from_v = (b_dv * -read[:, None]).to(b_kT.dtype)
        b_dS = b_dS * total[:, None]
        if HAS_OUTPUT:
            b_from_o = (b_do.to(tl.float32) * (read * scale)[:, None]).to(b_qT.dtype)
            b_dS = tl.dot(b_qT, b_from_o, b_dS, input_precision="ieee")
        b_dS = tl.dot(b_kT, b_from_v, b_dS, input_precision="ieee")
    tl.store(d_initial + of_document + i_S, b_dS, mask=m_S)

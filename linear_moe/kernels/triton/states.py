# mypy: allow-untyped-defs
"""States between segments, so that few heads and long sequences still fill a GPU.

    local(s)    = what segment s leaves in an empty memory              all segments at once, reads k and v
    S before s  = total(s - 1) * S before (s - 1) + local(s - 1)        a program walks a document, states only

Backward in time (``REVERSE``) the same kernels carry the gradient of the memory: k and v are then q and the gradient
of o, times ``write_scale``.

Letters: S segments, N documents, H heads, C tokens in a chunk, L tokens of all rows, DK and DV the dims of k and v,
BK >= DK and BV blocks of them. ``K_PER`` heads of the scan share one head of k.
"""

import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.triton.decay_sums import chunk_decay, sums_of
from linear_moe.kernels.triton.layout import segment_of

Local = tuple[Tensor, Tensor]
"""local(s) ``[S, H, K, V]`` and total(s) of every segment, float32."""


@triton.jit(do_not_specialize=["num_tokens", "segments_per_row", "num_documents"])
def diag_local_state_kernel(
    k, v, log_decay, sums, plan,
    local,  # [S, H, DK, DV] float32
    totals,  # [S, H] float32: what a segment keeps of the memory before it
    num_tokens, num_heads: tl.constexpr, segment_size, segments_per_row, num_documents, write_scale,
    k_b, k_h, v_b, v_h, k_t: tl.constexpr, v_t: tl.constexpr,
    K_PER: tl.constexpr, V_PER: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """local(s), BV columns of it; grid: S * H * ceil(DV / BV)."""
    NV: tl.constexpr = (DV + BV - 1) // BV
    i_v = tl.program_id(0) % NV
    head = (tl.program_id(0) // NV) % num_heads
    segment = tl.program_id(0) // NV // num_heads
    row, start, _, readable = segment_of(
        plan, segment, num_tokens, segment_size, segments_per_row, num_documents, IS_PACKED
    )
    i_C, i_K, i_V = tl.arange(0, C), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    k += row.to(tl.int64) * k_b + start.to(tl.int64) * k_t + (head // K_PER).to(tl.int64) * k_h
    v += row.to(tl.int64) * v_b + start.to(tl.int64) * v_t + (head // V_PER).to(tl.int64) * v_h

    m_K, m_V = (i_K < DK) | (DK == BK), (i_V < DV) | (DV % BV == 0)

    b_S = tl.zeros([BK, BV], tl.float32)
    kept = 1.0
    num_chunks = tl.cdiv(readable, C)
    AHEAD: tl.constexpr = DECAY == 2 and REVERSE  # of the next chunk in time, as in diag_scan.py
    if AHEAD:
        last = sums_of(sums, row * num_tokens + start, segment, num_chunks - 1, head, num_heads, C) + C - 1
        next_total = tl.load(last, mask=num_chunks > 0, other=0.0)
    for step in range(0, num_chunks):
        chunk = num_chunks - 1 - step if REVERSE else step
        m_C = chunk * C + i_C < readable
        m_kT = m_K[:, None] & m_C[None, :]
        m_v = m_C[:, None] & m_V[None, :]
        p_k = k + (chunk * C).to(tl.int64) * k_t + i_K[:, None] + i_C[None, :] * k_t
        p_v = v + (chunk * C).to(tl.int64) * v_t + i_C[:, None] * v_t + i_V[None, :]
        b_kT = tl.load(p_k, mask=m_kT, other=0.0)  # [BK, C]
        b_v = tl.load(p_v, mask=m_v, other=0.0)  # [C, BV]
        if DECAY != 0:
            high, low, last_high, last_low = chunk_decay(
                log_decay, sums_of(sums, row * num_tokens + start, segment, chunk, head, num_heads, C), head,
                readable - chunk * C, DECAY, C, v.dtype.element_ty == tl.float32,
            )  # fmt: skip
            if AHEAD:
                last_high = next_total
                ahead = tl.cast(tl.minimum(step + 1, num_chunks - 1), tl.int64)
                next_total = tl.load(last - ahead * (2 * C * num_heads))
            if REVERSE:
                write = tl.exp2(high) * write_scale
            else:
                write = tl.exp2((last_high - high) + (last_low - low))
            total = tl.exp2(last_high)
            kept *= total
            b_S = b_S * total
            b_v = (b_v * write[:, None]).to(b_v.dtype)
        elif REVERSE:
            b_v = (b_v * write_scale).to(b_v.dtype)
        b_S = tl.dot(b_kT, b_v, b_S, input_precision="ieee")  # [BK, BV]

    base = (segment.to(tl.int64) * num_heads + head) * (DK * DV)
    m_S = m_K[:, None] & m_V[None, :]
    tl.store(local + base + i_K[:, None] * DV + i_V[None, :], b_S, mask=m_S)
    if i_v == 0:
        tl.store(totals + segment * num_heads + head, kept)


@triton.jit(do_not_specialize=["segments_per_row"])
def diag_carry_kernel(
    states,  # [S, H, SIZE] float32: local(s), replaced by the memory before (backward in time: after) each segment
    totals,  # [S, H]
    initial,  # [N, H, SIZE] float32, or nothing
    final,  # [N, H, SIZE] float32
    first_segment,  # [N + 1]
    segments_per_row,
    num_heads,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    DECAY: tl.constexpr,
    REVERSE: tl.constexpr,
    IS_PACKED: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    KEPT: tl.constexpr = 1,
    SPAN: tl.constexpr = 1,
):
    """Grid: N * H * ceil(SIZE / BLOCK). ``KEPT`` totals for each segment and head: element e uses e // SPAN % KEPT."""
    NB: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    element = (tl.program_id(0) % NB) * BLOCK + tl.arange(0, BLOCK)
    head = (tl.program_id(0) // NB) % num_heads
    document = tl.program_id(0) // NB // num_heads
    if IS_PACKED:
        first = tl.load(first_segment + document)
        count = tl.load(first_segment + document + 1) - first
    else:
        first = document * segments_per_row
        count = segments_per_row
    mask = element < SIZE
    of_document = (document.to(tl.int64) * num_heads + head) * SIZE + element

    b_S = tl.zeros([BLOCK], tl.float32)
    if HAS_INITIAL:
        b_S = tl.load(initial + of_document, mask=mask, other=0.0)
    for step in range(0, count):
        segment = first + (count - 1 - step if REVERSE else step)
        at = segment.to(tl.int64) * num_heads + head
        p_state = states + at * SIZE + element
        b_local = tl.load(p_state, mask=mask, other=0.0)
        tl.store(p_state, b_S, mask=mask)
        if DECAY != 0:
            if KEPT == 1:
                b_S = b_S * tl.load(totals + at)
            else:
                b_S = b_S * tl.load(totals + at * KEPT + element // SPAN % KEPT, mask=mask, other=0.0)
        b_S += b_local
    tl.store(final + of_document, b_S, mask=mask)

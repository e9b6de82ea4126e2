# mypy: allow-untyped-defs
"""Gradients of the vectors along the dimension that decays, and of the decay, from the results of the scans.

    dx_t = scale (2^read_t dx'_t + sum over levels of 2^before_t dz_t)     dz = (w + w^T) z on each level, w: dpairs
    dy_t =        2^after_t dy'_t + scale (the same with 2^after_t)
    d log a_t = what readers t .. of the chunk and writers .. t - 1 exchange across t, + what only passes

z, the levels and both sums are those of diag_levels.py; dx' and dy' are the gradients of its scaled vectors. The
gradient of a sum of log decays is the element times its gradient, so that d log a is a sum of such products over the
tokens whose sums contain t. Every product is added as it is: nothing cancels, and a decay that lets nothing pass gets
a gradient as exact as one that lets all pass. ``through``, what only passes, is known for every ``EVERY``-th chunk, and
for those between from what the chunks read and write, as in decay_sums.py; docs/kernels.md derives all of it.

With ``FORWARD`` dx alone is computed: the output, where columns of the memory decay.

Letters: as in diag_levels.py, G groups of ``EVERY`` chunks.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.diag_levels import load_log_decay, next_level
from linear_moe.kernels.triton.layout import chunk_slot, segment_of


@triton.jit
def across(differ, i_C, LEVEL: tl.constexpr, READ_FIRST: tl.constexpr):
    """[t, i]: whether the sum of log decays of token i on this level contains token t."""
    is_same_half = (differ >> LEVEL) == 0
    is_reader = ((i_C >> LEVEL) & 1)[None, :] == 1
    if READ_FIRST:
        by_reader = i_C[None, :] > i_C[:, None]
    else:
        by_reader = i_C[None, :] >= i_C[:, None]
    by_writer = i_C[None, :] < i_C[:, None]
    return is_same_half & ((is_reader & by_reader) | (~is_reader & by_writer))


@triton.jit(do_not_specialize=["num_tokens", "segments_per_row", "num_documents"])
def combine_kernel(
    x, y, log_decay,  # [B, T, H, D], any strides; log_decay even in its last dim
    bonus,  # [H, D] float32, or nothing
    pairs,  # [L, H, C]: gradient of what each token takes from the tokens of its chunk, over scale
    scaled_dx, scaled_dy,  # [L, H, D]
    through,  # [G, H, D] float32
    dx, dy,  # [L, H, D]
    d_log,  # [L, H, D] float32
    d_bonus,  # [G, H, D] float32
    plan,
    num_tokens, num_heads, segment_size, segments_per_row, num_documents, groups_per_segment, scale,
    x_b, x_t, x_h, y_b, y_t, y_h, a_b, a_t, a_h, a_d,
    X_PER: tl.constexpr, Y_PER: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, EVERY: tl.constexpr, FORWARD: tl.constexpr, HAS_DECAY_GRADIENT: tl.constexpr,
    HAS_BONUS: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: groups of chunks of all segments, heads, blocks of D. From the end of a group to its start."""
    segment = tl.program_id(0) // groups_per_segment
    group = tl.program_id(0) % groups_per_segment
    head = tl.program_id(1)
    row, start, length, readable = segment_of(
        plan, segment, num_tokens, segment_size, segments_per_row, num_documents, IS_PACKED
    )
    row, first = row.to(tl.int64), start.to(tl.int64)
    token = row * num_tokens + start
    x += row * x_b + first * x_t + (head // X_PER).to(tl.int64) * x_h
    y += row * y_b + first * y_t + (head // Y_PER).to(tl.int64) * y_h
    log_decay += row * a_b + first * a_t + head.to(tl.int64) * a_h
    i_C, i_D = tl.arange(0, C), tl.program_id(2) * BD + tl.arange(0, BD)
    m_D = i_D < D
    differ = i_C[:, None] ^ i_C[None, :]

    last_chunk = tl.cdiv(length, C) - 1 - group * EVERY
    of_group = (chunk_slot(token, segment, group, C * EVERY) * num_heads + head) * D + i_D
    b_through = tl.zeros([BD], tl.float32)
    if HAS_DECAY_GRADIENT:
        b_through = tl.load(through + of_group, mask=m_D & (last_chunk >= 0) & (readable > 0), other=0.0)
    b_u, b_du = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    if HAS_BONUS:
        b_u = tl.load(bonus + head * D + i_D, mask=m_D, other=0.0)

    for step in range(0, tl.minimum(last_chunk + 1, EVERY)):
        past = ((last_chunk - step) * C).to(tl.int64)
        left = readable - past
        mask = (i_C[:, None] < left) & m_D[None, :]
        of_chunk = (token + past) * num_heads + head
        p_D = of_chunk * D + i_C[:, None].to(tl.int64) * num_heads * D + i_D[None, :]
        m_store = (i_C[:, None] < length - past) & m_D[None, :]
        p_a = log_decay + past * a_t + i_C[:, None].to(tl.int64) * a_t + i_D[None, :] * a_d
        b_a = load_log_decay(p_a, mask)  # [C, BD]
        b_x = tl.zeros([C, BD], y.dtype.element_ty)
        if not FORWARD:
            b_x = tl.load(x + past * x_t + i_C[:, None] * x_t + i_D[None, :], mask=mask, other=0.0)
        b_y = tl.load(y + past * y_t + i_C[:, None] * y_t + i_D[None, :], mask=mask, other=0.0)
        later, earlier = tl.maximum(i_C[:, None], i_C[None, :]), tl.minimum(i_C[:, None], i_C[None, :])
        p_pairs = pairs + of_chunk * C + later.to(tl.int64) * num_heads * C + earlier
        b_pairs = tl.load(p_pairs, mask=later < left, other=0.0).to(tl.float32) * scale  # [C, C], symmetric
        own = tl.sum(tl.where(differ == 0, b_pairs, 0.0), 1)[:, None]
        b_pairs = b_pairs.to(b_y.dtype)

        # a token with itself does not decay
        b_dx, b_dy = own * b_y.to(tl.float32), own * b_x.to(tl.float32)
        if HAS_BONUS:
            b_du += tl.sum(b_dx * b_x.to(tl.float32), 0)
            b_dx, b_dy = b_dx * b_u[None, :], b_dy * b_u[None, :]

        before, after = tl.zeros([C, BD], tl.float32), tl.zeros([C, BD], tl.float32)
        b_log = tl.zeros([C, BD], tl.float32) + b_through[None, :]
        for level in tl.static_range(LEVELS):
            is_reader = ((i_C >> level) & 1)[:, None] == 1
            read = before if HAS_BONUS else before + b_a
            factor = tl.exp2(tl.where(is_reader, read, after))
            b_z = (tl.where(is_reader, b_x, b_y).to(tl.float32) * factor).to(b_y.dtype)
            of_level = tl.where((differ >> level) == 1, b_pairs, 0.0)
            b_dz = tl.dot(of_level, b_z, input_precision="ieee")  # [C, BD]
            if HAS_DECAY_GRADIENT:
                b_across = across(differ, i_C, level, HAS_BONUS).to(b_y.dtype)
                b_product = (b_z.to(tl.float32) * b_dz).to(b_y.dtype)
                b_log = tl.dot(b_across, b_product, b_log, input_precision="ieee")
            b_dz *= factor
            b_dx = tl.where(is_reader, b_dx + b_dz, b_dx)
            b_dy = tl.where(is_reader, b_dy, b_dy + b_dz)
            before, after = next_level(before, after, b_a, level)

        factor = tl.exp2(before if HAS_BONUS else before + b_a) * scale
        b_scaled = tl.load(scaled_dx + p_D, mask=mask, other=0.0).to(tl.float32) * factor
        b_dx += b_scaled
        tl.store(dx + p_D, b_dx.to(dx.dtype.element_ty), mask=m_store)
        if not FORWARD:
            b_reads = b_scaled * b_x.to(tl.float32)
            b_scaled = tl.load(scaled_dy + p_D, mask=mask, other=0.0).to(tl.float32) * tl.exp2(after)
            b_dy += b_scaled
            tl.store(dy + p_D, b_dy.to(dy.dtype.element_ty), mask=m_store)
            if HAS_DECAY_GRADIENT:
                b_writes = b_scaled * b_y.to(tl.float32)
                if step > 0:
                    passed = tl.sum(b_writes, 0)
                    b_through -= passed
                    b_log -= passed[None, :]
                if HAS_BONUS:
                    readers = i_C[None, :] > i_C[:, None]
                else:
                    readers = i_C[None, :] >= i_C[:, None]
                b_log = tl.dot(readers.to(b_y.dtype), b_reads.to(b_y.dtype), b_log, input_precision="ieee")
                writers = (i_C[None, :] < i_C[:, None]).to(b_y.dtype)
                b_log = tl.dot(writers, b_writes.to(b_y.dtype), b_log, input_precision="ieee")
                tl.store(d_log + p_D, tl.where(mask, b_log, 0.0), mask=m_store)
                b_through += tl.sum(b_reads, 0)
    if HAS_BONUS:
        tl.store(d_bonus + of_group, b_du, mask=m_D & (last_chunk >= 0))

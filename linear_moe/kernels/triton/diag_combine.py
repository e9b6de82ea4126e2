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

Chunks whose decays are weak go another way, diag_weak.py's.

With ``FORWARD`` dx alone is computed: the output, where columns of the memory decay.

Letters: as in diag_levels.py, G groups of ``EVERY`` chunks.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.diag_levels import halves, load_log_decay, load_roles, sum_over
from linear_moe.kernels.triton.diag_weak import combine_weak
from linear_moe.kernels.triton.layout import chunk_slot, mask_if, segment_of


@triton.jit
def add_across(b_log, sums, level, product):
    """Add to the gradient of log2 a of each token the products of all tokens whose sum contains it."""
    C: tl.constexpr = product.shape[0]
    i_C = tl.arange(0, C)
    b_sums = tl.load(sums + level * (C * C) + i_C[:, None] * C + i_C[None, :])
    return tl.dot(b_sums, product, b_log, input_precision="ieee")


@triton.jit
def combine_levels(
    x, y, log_decay, bonus, pairs, scaled_dx, scaled_dy, through, dx, dy, d_log, d_bonus, sums,
    i_D, token, head, last_chunk, of_group, length, readable, scale,
    num_heads: tl.constexpr, x_t: tl.constexpr, y_t: tl.constexpr, a_t: tl.constexpr, a_d: tl.constexpr,
    D: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, EVERY: tl.constexpr, FORWARD: tl.constexpr,
    HAS_DECAY_GRADIENT: tl.constexpr, HAS_BONUS: tl.constexpr,
):  # fmt: skip
    """One group of chunks and block of columns."""
    BD: tl.constexpr = i_D.shape[0]
    i_C, m_D = tl.arange(0, C), i_D < D
    of_group += i_D
    b_through = tl.zeros([BD], tl.float32)
    if HAS_DECAY_GRADIENT:
        is_there = (last_chunk >= 0) & (readable > 0)
        b_through = tl.load(through + of_group, mask=mask_if(m_D, is_there), other=0.0)
    b_u, b_du = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    if HAS_BONUS:
        b_u = tl.load(bonus + i_D, mask=m_D, other=0.0)

    sums_T, is_level = sums + (LEVELS + 2) * C * C, sums + 2 * (LEVELS + 2) * C * C
    for step in range(0, tl.minimum(last_chunk + 1, EVERY)):
        past = (last_chunk - step) * C
        left = readable - past
        mask = (i_C[:, None] < left) & m_D[None, :]
        of_chunk = (token + past) * num_heads + head
        i_tile = i_C[:, None] * (num_heads * D) + i_D[None, :]
        m_store = (i_C[:, None] < length - past) & m_D[None, :]
        x_chunk, y_chunk = x + past.to(tl.int64) * x_t, y + past.to(tl.int64) * y_t
        p_a = log_decay + past.to(tl.int64) * a_t + i_C[:, None] * a_t + i_D[None, :] * a_d
        high, low = halves(load_log_decay(p_a, mask), dx.dtype.element_ty)  # [C, BD]
        p_pairs = pairs + of_chunk * C + i_C[:, None] * (num_heads * C) + i_C[None, :]
        b_pairs = tl.load(p_pairs, mask=i_C[:, None] < left, other=0.0).to(tl.float32) * scale  # [C, C]
        b_pairs = tl.where(i_C[:, None] > i_C[None, :], b_pairs, 0.0).to(dx.dtype.element_ty)
        b_pairs += tl.trans(b_pairs)

        b_dx, b_dy = tl.zeros([C, BD], tl.float32), tl.zeros([C, BD], tl.float32)
        b_log = tl.zeros([C, BD], tl.float32)
        half = 1
        for level in range(LEVELS):
            b_factor = tl.exp2(sum_over(sums, level, high, low))
            b_z = load_roles(x_chunk, y_chunk, x_t, y_t, i_D, half, left, m_D, C)
            b_z = (b_z.to(tl.float32) * b_factor).to(dx.dtype.element_ty)
            of_level = b_pairs * tl.load(is_level + level * C * C + i_C[:, None] * C + i_C[None, :])
            b_dz = tl.dot(of_level, b_z, input_precision="ieee")  # [C, BD]
            if HAS_DECAY_GRADIENT:
                b_log = add_across(b_log, sums_T, level, (b_z.to(tl.float32) * b_dz).to(dx.dtype.element_ty))
            b_dz *= b_factor
            is_reader = (i_C & half)[:, None] != 0
            b_dx = tl.where(is_reader, b_dx + b_dz, b_dx)
            b_dy = tl.where(is_reader, b_dy, b_dy + b_dz)
            half *= 2

        # a token with itself does not decay; tiles are read again, since registers are short
        p_own = pairs + of_chunk * C + i_C * (num_heads * C + 1)
        own = (tl.load(p_own, mask=i_C < left, other=0.0).to(tl.float32) * scale)[:, None]
        b_scaled = tl.load(scaled_dx + of_chunk * D + i_tile, mask=mask, other=0.0).to(tl.float32)
        b_scaled *= tl.exp2(sum_over(sums, LEVELS, high, low)) * scale
        b_own = own * tl.load(y_chunk + i_C[:, None] * y_t + i_D[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        if HAS_BONUS:
            b_own *= b_u[None, :]
        b_dx += b_own
        tl.store(dx + of_chunk * D + i_tile, (b_dx + b_scaled).to(dx.dtype.element_ty), mask=m_store)
        if not FORWARD:
            b_x = tl.load(x_chunk + i_C[:, None] * x_t + i_D[None, :], mask=mask, other=0.0).to(tl.float32)
            b_scaled *= b_x
            read = tl.sum(b_scaled, 0)
            if HAS_DECAY_GRADIENT:
                b_log = add_across(b_log, sums_T, LEVELS, b_scaled.to(dx.dtype.element_ty))
            b_own = own * b_x
            if HAS_BONUS:
                b_y = tl.load(y_chunk + i_C[:, None] * y_t + i_D[None, :], mask=mask, other=0.0).to(
                    tl.float32
                )
                b_du += tl.sum(b_own * b_y, 0)
                b_own *= b_u[None, :]
            b_dy += b_own
            b_scaled = tl.load(scaled_dy + of_chunk * D + i_tile, mask=mask, other=0.0).to(tl.float32)
            b_scaled *= tl.exp2(sum_over(sums, LEVELS + 1, high, low))
            tl.store(dy + of_chunk * D + i_tile, (b_dy + b_scaled).to(dy.dtype.element_ty), mask=m_store)
            if HAS_DECAY_GRADIENT:
                p_y = y_chunk + i_C[:, None] * y_t + i_D[None, :]
                b_scaled *= tl.load(p_y, mask=mask, other=0.0).to(tl.float32)
                if step > 0:
                    b_through -= tl.sum(b_scaled, 0)
                b_log = (
                    add_across(b_log, sums_T, LEVELS + 1, b_scaled.to(dx.dtype.element_ty))
                    + b_through[None, :]
                )
                tl.store(d_log + of_chunk * D + i_tile, tl.where(mask, b_log, 0.0), mask=m_store)
                b_through += read
    if HAS_BONUS:
        tl.store(d_bonus + of_group, b_du, mask=mask_if(m_D, last_chunk >= 0))


@triton.jit
def least_kept(
    totals, token, segment, head, last_chunk, i_D,
    num_heads: tl.constexpr, D: tl.constexpr, C: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    """Log2 of the least that a chunk of a group keeps of a column."""
    i_step, i_D = tl.arange(0, EVERY)[:, None], i_D[None, :]
    slot = chunk_slot(token, segment, last_chunk - i_step, C)
    mask = (i_step <= last_chunk) & (i_D < D)
    b_totals = tl.load(totals + (slot * num_heads + head) * D + i_D, mask=mask, other=0.0)
    return tl.min(tl.min(b_totals, 1), 0)


@triton.jit(do_not_specialize=["num_tokens", "segments_per_row", "num_documents", "groups_per_segment"])
def diag_combine_kernel(
    x, y, log_decay,  # [B, T, H, D], any strides; log_decay even in its last dim
    bonus,  # [H, D] float32, or nothing
    pairs,  # [L, H, C]: gradient of what each token takes from the tokens of its chunk, over scale
    scaled_dx, scaled_dy,  # [L, H, D]
    through,  # [G, H, D] float32
    totals,  # [M, H, D] float32: log2 of what a chunk keeps
    dx, dy,  # [L, H, D]
    d_log,  # [L, H, D] float32
    d_bonus,  # [G, H, D] float32
    sums,  # level_sums
    plan,
    num_tokens, num_heads: tl.constexpr, segment_size, segments_per_row, num_documents, groups_per_segment, scale,
    x_b, x_h, y_b, y_h, a_b, a_h,
    x_t: tl.constexpr, y_t: tl.constexpr, a_t: tl.constexpr, a_d: tl.constexpr,
    X_PER: tl.constexpr, Y_PER: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, PART: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, LEAST: tl.constexpr, EVERY: tl.constexpr, FORWARD: tl.constexpr,
    HAS_DECAY_GRADIENT: tl.constexpr, HAS_BONUS: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: groups of chunks of all segments, heads, blocks of D. From the end of a group to its start.

    A group whose chunks keep 2^LEAST of every column, or more, goes by one border, another by levels.
    """
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
    bonus += head * D
    last_chunk = tl.cdiv(length, C) - 1 - group * EVERY
    of_group = (chunk_slot(token, segment, group, C * EVERY) * num_heads + head) * D
    i_D = tl.program_id(2) * BD + tl.arange(0, BD)
    if (
        LEAST < 0
        and least_kept(totals, token, segment, head, last_chunk, i_D, num_heads, D, C, EVERY) >= LEAST
    ):
        combine_weak(
            x, y, log_decay, pairs, scaled_dx, scaled_dy, through, totals, dx, dy, d_log, sums,
            i_D, token, segment, head, last_chunk, of_group, length, readable, scale, num_heads,
            x_t, y_t, a_t, a_d, D, BD, C, LEVELS, EVERY, FORWARD, HAS_DECAY_GRADIENT,
        )  # fmt: skip
    else:
        for part in range(0, BD, PART):
            combine_levels(
                x, y, log_decay, bonus, pairs, scaled_dx, scaled_dy, through, dx, dy, d_log, d_bonus, sums,
                tl.program_id(2) * BD + part + tl.arange(0, PART), token, head, last_chunk, of_group,
                length, readable, scale, num_heads, x_t, y_t, a_t, a_d, D, C, LEVELS, EVERY, FORWARD,
                HAS_DECAY_GRADIENT, HAS_BONUS,
            )  # fmt: skip

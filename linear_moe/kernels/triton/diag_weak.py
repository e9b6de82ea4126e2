# mypy: allow-untyped-defs
"""Inside a chunk whose decays are weak: one border for all pairs, where diag_levels.py needs one for each level.

    z^x_i = x_i 2^(read_i - G / 2)        z^y_j = y_j 2^(write_j - G / 2)        scores = z^x (z^y)^T

``read`` is what token i reads of the memory before the chunk, ``write`` what is left of its write at the end, both log2
and at most 0, and G their sum over the whole chunk; the border is where half of G has passed. Of the two exponents one
is positive in most pairs, by at most ``-G / 2``: so this holds only where G, which the kernels look at, is at least
``LEAST``. Factors, products and gradients then stay in the range of the dtype, with the relative precision of levels.
A chunk and block of columns with one column below goes by levels. float32 always does.

A gradient of log2 a is a sum of x dx - y dy over the tokens behind in its chunk, pairs and memory together: what is no
part of it cancels, between terms that are no more than a chunk and that were not rounded but to two parts.

Letters: as in diag_levels.py and diag_combine.py. Tiles are [BD, C]: tokens are columns, so that all first factors
stay in registers.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.diag_levels import halves, load_log_decay
from linear_moe.kernels.triton.layout import chunk_slot, mask_if


@triton.jit
def keeps(totals, place, LEAST: tl.constexpr, DK: tl.constexpr):
    """Whether a chunk keeps ``LEAST`` or more of every row of the memory, of at most 256."""
    i_K = tl.arange(0, 256)
    return tl.min(tl.load(totals + place * DK + i_K, mask=i_K < DK, other=1.0), 0) >= LEAST


@triton.jit
def scale_weak(
    b_pairs, x, y, b_a, b_total, scaled_x, scaled_y, sums, i_D, m_D, x_t, y_t, out_t, left, scale,
    LEVELS: tl.constexpr,
):  # fmt: skip
    """A block of columns of ``diag_scale_kernel``; adds pairs over scale to ``b_pairs``. ``b_a`` [BD, C]: log2 a."""
    C: tl.constexpr = b_a.shape[1]
    dtype: tl.constexpr = scaled_y.dtype.element_ty
    i_C = tl.arange(0, C)
    mask = m_D[:, None] & (i_C[None, :] < left)
    p_sums = sums + (2 * LEVELS + 2) * C * C + i_C[:, None] * C + i_C[None, :]  # transposed ones
    high, low = halves(b_a, dtype)
    border = b_total[:, None] * 0.5
    b_sums = tl.load(p_sums)
    b_g = tl.dot(high, b_sums, input_precision="ieee")
    b_g = tl.dot(low, b_sums, b_g, input_precision="ieee") - border
    border = tl.exp2(border)
    i_out = i_D[:, None] + i_C[None, :] * out_t
    b_x = tl.load(x + i_D[:, None] + i_C[None, :] * x_t, mask=mask, other=0.0).to(tl.float32)
    b_y = tl.load(y + i_D[:, None] + i_C[None, :] * y_t, mask=mask, other=0.0).to(tl.float32)
    b_x *= tl.exp2(b_g)
    tl.store(scaled_x + i_out, (b_x * (border * scale)).to(dtype), mask=mask)
    b_y *= tl.exp2(-b_g)
    tl.store(scaled_y + i_out, (b_y * border).to(dtype), mask=mask)
    b_scores = tl.dot(tl.trans(b_x.to(dtype)), b_y.to(dtype), input_precision="ieee")  # [C, C]
    return b_pairs + tl.where(i_C[:, None] >= i_C[None, :], b_scores, 0.0)


@triton.jit
def combine_weak(
    x, y, log_decay, pairs, scaled_dx, scaled_dy, through, totals, dx, dy, d_log, sums,
    i_D, token, segment, head, last_chunk, of_group, length, readable, scale,
    num_heads: tl.constexpr, x_t: tl.constexpr, y_t: tl.constexpr, a_t: tl.constexpr, a_d: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, EVERY: tl.constexpr,
    FORWARD: tl.constexpr, HAS_DECAY_GRADIENT: tl.constexpr,
):  # fmt: skip
    """One group of chunks and block of columns of ``diag_combine_kernel``."""
    dtype: tl.constexpr = dx.dtype.element_ty
    i_C, i_D = tl.arange(0, C), i_D[:, None]
    m_D = (i_D < D) | (D % BD == 0)  # [BD, 1]
    i_sums = i_C[:, None] * C + i_C[None, :]
    of_group += i_D
    b_passes = i_D * 0.0  # what passes through the chunk, and what it writes
    if HAS_DECAY_GRADIENT:
        b_passes = tl.load(
            through + of_group, mask=mask_if(m_D, (last_chunk >= 0) & (readable > 0)), other=0.0
        )
    for step in range(0, tl.minimum(last_chunk + 1, EVERY)):
        past = (last_chunk - step) * C
        left = readable - past
        mask = m_D & (i_C[None, :] < left)
        m_store = m_D & (i_C[None, :] < length - past)
        of_chunk = (token + past) * num_heads + head
        i_tile = i_D + i_C[None, :] * (num_heads * D)
        p_x = x + past.to(tl.int64) * x_t + i_D + i_C[None, :] * x_t
        p_y = y + past.to(tl.int64) * y_t + i_D + i_C[None, :] * y_t
        p_a = log_decay + past.to(tl.int64) * a_t + i_D * a_d + i_C[None, :] * a_t
        high, low = halves(load_log_decay(p_a, mask), dtype)  # [BD, C]
        of_totals = (chunk_slot(token, segment, last_chunk - step, C) * num_heads + head) * D + i_D
        border = tl.load(totals + of_totals, mask=m_D, other=0.0) * 0.5
        p_reads = sums + LEVELS * C * C + i_sums
        b_sums = tl.load(p_reads)
        b_g = tl.dot(high, tl.trans(b_sums), input_precision="ieee")
        b_g = tl.dot(low, tl.trans(b_sums), b_g, input_precision="ieee") - border
        border = tl.exp2(border)

        p_pairs = pairs + of_chunk * C
        b_pairs = tl.load(  # [C, C], nothing above the diagonal
            p_pairs + i_C[:, None] * (num_heads * C) + i_C[None, :], mask=i_C[:, None] < left, other=0.0
        )
        b_y = tl.load(p_y, mask=mask, other=0.0).to(tl.float32)
        b_zy = (b_y * tl.exp2(-b_g)).to(dtype)
        b_dz = tl.dot(b_zy, tl.trans(b_pairs), input_precision="ieee")
        b_scaled = tl.load(scaled_dx + of_chunk * D + i_tile, mask=mask, other=0.0).to(tl.float32)
        b_dz = (b_dz + b_scaled * border) * scale
        b_dx = b_dz * tl.exp2(b_g)
        tl.store(dx + of_chunk * D + i_tile, b_dx.to(dtype), mask=m_store)
        if not FORWARD:
            b_x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
            b_zx = (b_x * tl.exp2(b_g)).to(dtype)
            b_log = b_dz * b_zx.to(tl.float32)
            b_dz = tl.dot(b_zx, b_pairs, input_precision="ieee")
            b_scaled = (
                tl.load(scaled_dy + of_chunk * D + i_tile, mask=mask, other=0.0).to(tl.float32) * border
            )
            if step == 0:
                b_passes += tl.sum(b_scaled * b_zy.to(tl.float32), 1, keep_dims=True)
            b_dz = b_dz * scale + b_scaled
            b_dy = b_dz * tl.exp2(-b_g)
            tl.store(dy + of_chunk * D + i_tile, b_dy.to(dtype), mask=m_store)
            if HAS_DECAY_GRADIENT:
                b_dz *= b_zy.to(tl.float32)
                b_log -= b_dz
                high, low = halves(b_log, dtype)
                b_sum = tl.dot(high, b_sums, input_precision="ieee")
                b_sum = tl.dot(low, b_sums, b_sum, input_precision="ieee") + b_passes
                tl.store(d_log + of_chunk * D + i_tile, b_sum, mask=m_store)
                b_passes += tl.sum(b_log, 1, keep_dims=True)

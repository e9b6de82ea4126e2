# mypy: allow-untyped-defs
"""The kernels of short_conv.py, in its letters. A program owns a run of tokens and a block of channels of a group."""

import triton
import triton.language as tl


@triton.jit
def place_of(cu_seqlens, document, row, token, num_tokens, num_documents, IS_PACKED: tl.constexpr):
    """Document and first token of each of ``token``, and whether a document has it."""
    is_there = token < num_tokens
    if IS_PACKED:
        n = tl.load(document + token, mask=is_there, other=0)
        is_there = is_there & (n < num_documents)
        return n, tl.load(cu_seqlens + n, mask=is_there, other=0).to(tl.int32), is_there
    return row + tl.zeros_like(token), tl.zeros_like(token), is_there


@triton.jit
def input_at(
    x, state, token, n, start, is_read, x_t, i_D, m_D, num_channels, W: tl.constexpr, HAS_STATE: tl.constexpr
):
    """``[TILE, BLOCK]`` float32 inputs at ``token``, from the history where that is before ``start``, or zeros."""
    m_x = (is_read & (token >= start))[:, None] & m_D[None, :]
    value = tl.load(x + token.to(tl.int64)[:, None] * x_t + i_D[None, :], mask=m_x, other=0.0).to(tl.float32)
    if HAS_STATE:
        slot = n.to(tl.int64) * (W - 1) + (W - 1) + token - start
        m_s = (is_read & (token < start))[:, None] & m_D[None, :]
        value += tl.load(state + slot[:, None] * num_channels + i_D[None, :], mask=m_s, other=0.0).to(
            tl.float32
        )
    return value


@triton.jit
def before_activation(
    x, weight, bias, state, token, n, start, is_there, x_t, i_D, m_D, num_channels,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """p at ``token``, ``[TILE, BLOCK]`` float32."""
    p = tl.zeros([token.shape[0], i_D.shape[0]], tl.float32)
    for j in tl.static_range(W):
        tap = tl.load(weight + i_D * W + j, mask=m_D, other=0.0).to(tl.float32)
        at = token - (W - 1) + j
        p += (
            input_at(x, state, at, n, start, is_there, x_t, i_D, m_D, num_channels, W, HAS_STATE)
            * tap[None, :]
        )
    if HAS_BIAS:
        p += tl.load(bias + i_D, mask=m_D, other=0.0).to(tl.float32)[None, :]
    return p


@triton.jit
def gradient_before_activation(
    x, weight, bias, state, dy, token, n, start, is_there, x_t, dy_t, i_D, m_D, num_channels,
    W: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """dp at ``token``, ``[TILE, BLOCK]`` float32; zero where no document has the token."""
    m_y = is_there[:, None] & m_D[None, :]
    dp = tl.load(dy + token.to(tl.int64)[:, None] * dy_t + i_D[None, :], mask=m_y, other=0.0).to(tl.float32)
    if SILU:
        p = before_activation(
            x, weight, bias, state, token, n, start, is_there, x_t, i_D, m_D, num_channels, W, HAS_BIAS, HAS_STATE
        )  # fmt: skip
        gate = tl.sigmoid(p)
        dp *= gate * (1 + p * (1 - gate))
    return dp


@triton.jit(do_not_specialize=["num_tokens", "num_documents", "num_runs"])
def forward_kernel(
    x, weight, bias, state, cu_seqlens, document, y,
    num_tokens, num_documents, num_groups, num_runs, x_b, x_t, x_g,
    W: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """y ``[B, T, G, D]``, contiguous. Grid: (B * R, G * blocks)."""
    NB: tl.constexpr = (D + BLOCK - 1) // BLOCK
    row, run, group = tl.program_id(0) // num_runs, tl.program_id(0) % num_runs, tl.program_id(1) // NB
    i_D = (tl.program_id(1) % NB) * BLOCK + tl.arange(0, BLOCK)
    m_D = i_D < D
    num_channels = num_groups * D
    x += row.to(tl.int64) * x_b + group.to(tl.int64) * (x_g - D)  # i_D counts the channels of all groups
    i_D += group * D
    y += row.to(tl.int64) * num_tokens * num_channels
    for tile in range(tl.cdiv(tl.minimum(RUN, num_tokens - run * RUN), TILE)):
        token = run * RUN + tile * TILE + tl.arange(0, TILE)
        n, start, is_there = place_of(cu_seqlens, document, row, token, num_tokens, num_documents, IS_PACKED)
        p = before_activation(
            x, weight, bias, state, token, n, start, is_there, x_t, i_D, m_D, num_channels, W, HAS_BIAS, HAS_STATE
        )  # fmt: skip
        if SILU:
            p *= tl.sigmoid(p)
        p = tl.where(is_there[:, None], p, 0.0)
        m_y = (token < num_tokens)[:, None] & m_D[None, :]
        tl.store(
            y + token.to(tl.int64)[:, None] * num_channels + i_D[None, :], p.to(y.dtype.element_ty), mask=m_y
        )


@triton.jit(do_not_specialize=["num_tokens", "num_documents", "num_runs"])
def backward_kernel(
    x, weight, bias, state, cu_seqlens, document, dy, dx, parts,
    num_tokens, num_documents, num_groups, num_runs, x_b, x_t, x_g, dy_b, dy_t, dy_g, dx_b, dx_t, dx_g, first,
    W: tl.constexpr, D: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """dx, and dweight and dbias of each run, ``parts`` ``[B * R, W + 1, G * C]``.

    Of D of C channels from ``first`` on: x, dy and dx, ``[B, T, G, D]``, have no others.
    """
    NB: tl.constexpr = (D + BLOCK - 1) // BLOCK
    row, run, group = tl.program_id(0) // num_runs, tl.program_id(0) % num_runs, tl.program_id(1) // NB
    i_D = (tl.program_id(1) % NB) * BLOCK + tl.arange(0, BLOCK)
    m_D = i_D < D
    num_channels = num_groups * C
    x += row.to(tl.int64) * x_b + group.to(tl.int64) * (x_g - C) - first
    dy += row.to(tl.int64) * dy_b + group.to(tl.int64) * (dy_g - C) - first
    dx += row.to(tl.int64) * dx_b + group.to(tl.int64) * (dx_g - C) - first
    i_D += group * C + first
    d_bias = tl.zeros([TILE, BLOCK], tl.float32)
    d_tap_0, d_tap_1, d_tap_2, d_tap_3 = d_bias, d_bias, d_bias, d_bias
    for tile in range(tl.cdiv(tl.minimum(RUN, num_tokens - run * RUN), TILE)):
        token = run * RUN + tile * TILE + tl.arange(0, TILE)
        d_input = tl.zeros([TILE, BLOCK], tl.float32)
        for m in tl.static_range(W):
            n, start, is_there = place_of(
                cu_seqlens, document, row, token + m, num_tokens, num_documents, IS_PACKED
            )  # fmt: skip
            dp = gradient_before_activation(
                x, weight, bias, state, dy, token + m, n, start, is_there, x_t, dy_t, i_D, m_D, num_channels,
                W, SILU, HAS_BIAS, HAS_STATE,
            )  # fmt: skip
            tap = tl.load(weight + i_D * W + (W - 1 - m), mask=m_D, other=0.0).to(tl.float32)
            d_input += tl.where((start <= token)[:, None], dp, 0.0) * tap[None, :]
            if m == 0:
                d_bias += dp
                for j in tl.static_range(W):
                    at = token - (W - 1) + j
                    term = dp * input_at(
                        x, state, at, n, start, is_there, x_t, i_D, m_D, num_channels, W, HAS_STATE
                    )
                    if j == 0:
                        d_tap_0 += term
                    elif j == 1:
                        d_tap_1 += term
                    elif j == 2:
                        d_tap_2 += term
                    else:
                        d_tap_3 += term
        m_x = (token < num_tokens)[:, None] & m_D[None, :]
        at_x = token.to(tl.int64)[:, None] * dx_t + i_D[None, :]
        tl.store(dx + at_x, d_input.to(dx.dtype.element_ty), mask=m_x)
    parts += tl.program_id(0).to(tl.int64) * (W + 1) * num_channels + i_D
    tl.store(parts, tl.sum(d_tap_0, 0), mask=m_D)
    if W > 1:
        tl.store(parts + num_channels, tl.sum(d_tap_1, 0), mask=m_D)
    if W > 2:
        tl.store(parts + 2 * num_channels, tl.sum(d_tap_2, 0), mask=m_D)
    if W > 3:
        tl.store(parts + 3 * num_channels, tl.sum(d_tap_3, 0), mask=m_D)
    tl.store(parts + W * num_channels, tl.sum(d_bias, 0), mask=m_D)


@triton.jit(do_not_specialize=["num_tokens", "num_documents", "num_runs"])
def history_kernel(
    x, weight, bias, state, cu_seqlens, document, dy, d_state,
    num_tokens, num_documents, num_groups, num_runs, x_b, x_t, x_g, dy_b, dy_t, dy_g, first,
    W: tl.constexpr, D: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """d_state ``[N, W - 1, G * C]``: what the first tokens of each document read of its history. Grid: (N, blocks)."""
    NB: tl.constexpr = (D + BLOCK - 1) // BLOCK
    n, group = tl.program_id(0), tl.program_id(1) // NB
    i_D = (tl.program_id(1) % NB) * BLOCK + tl.arange(0, BLOCK)
    m_D = i_D < D
    num_channels = num_groups * C
    if IS_PACKED:
        row, start = 0, tl.load(cu_seqlens + n).to(tl.int32)
        end = tl.load(cu_seqlens + n + 1).to(tl.int32)
    else:
        row, start, end = n, 0, num_tokens
        x += row.to(tl.int64) * x_b
        dy += row.to(tl.int64) * dy_b
    x += group.to(tl.int64) * (x_g - C) - first
    dy += group.to(tl.int64) * (dy_g - C) - first
    i_D += group * C + first
    for i in tl.static_range(W - 1):
        d_input = tl.zeros([1, BLOCK], tl.float32)
        for s in tl.static_range(i + 1):
            token = start + s + tl.arange(0, 1)
            dp = gradient_before_activation(
                x, weight, bias, state, dy, token, n + tl.zeros_like(token), start + tl.zeros_like(token), token < end,
                x_t, dy_t, i_D, m_D, num_channels, W, SILU, HAS_BIAS, HAS_STATE,
            )  # fmt: skip
            tap = tl.load(weight + i_D * W + (i - s), mask=m_D, other=0.0).to(tl.float32)
            d_input += dp * tap[None, :]
        at = (n.to(tl.int64) * (W - 1) + i) * num_channels + i_D
        tl.store(d_state + at, tl.sum(d_input, 0).to(d_state.dtype.element_ty), mask=m_D)

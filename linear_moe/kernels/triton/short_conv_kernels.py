# mypy: allow-untyped-defs, disable-error-code="assignment"
# ruff: noqa: RUF005  # Triton takes no star in a tuple
"""The kernels of short_conv.py, in its letters.

A program, one warp, owns a run of tokens and a block of channels, counted through all groups. It walks from token to
token and has in registers what the next one needs: the filters, the W - 1 inputs before it (``seen``), and backward
the gradients of those inputs so far (``pending``), oldest first. So each number is loaded once, but for W - 1 tokens
where runs meet. The next ``AHEAD`` tokens are on their way while as many are worked on.
"""

import triton
import triton.language as tl

from linear_moe.kernels.triton.layout import mask_if


@triton.jit
def channels_of(
    block, num_groups, first, zero, D: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """``[BLOCK]`` channels: group, or one for all, place in it, place among all that have filters, and a mask.

    Groups have D channels in x, which are those of the C with filters from ``first`` on. ``zero`` is 0, but the
    compiler does not know: it may rely on multiples of ``WIDE`` alone, in every tensor. So all loads and stores are
    equally wide, all blocks have the same layout, and none moves between lanes.
    """
    if D % BLOCK == 0:
        group = (block // (D // BLOCK)).to(tl.int64)
        place = block % (D // BLOCK) * BLOCK + tl.arange(0, BLOCK)
        m_D = tl.full([BLOCK], 1, tl.int1)
    else:
        i_D = block * BLOCK + tl.arange(0, BLOCK)
        group, place, m_D = (i_D // D).to(tl.int64), i_D % D, i_D < num_groups * D
    place = place.to(tl.int64) + tl.cast(zero, tl.int64) * WIDE
    return group, place, group * C + first + place, m_D


@triton.jit
def filters_of(weight, bias, channel, m_D, W: tl.constexpr, HAS_BIAS: tl.constexpr):
    """W taps and then the bias, ``[BLOCK]`` float32 each."""
    filters = ()
    for j in tl.static_range(W):
        filters = filters + (tl.load(weight + channel * W + j, mask=m_D, other=0.0).to(tl.float32),)
    if HAS_BIAS:
        added = tl.load(bias + channel, mask=m_D, other=0.0).to(tl.float32)
    else:
        added = tl.zeros(channel.shape, tl.float32)
    return filters + (added,)


@triton.jit
def place_of(cu_seqlens, document, row, token, num_tokens, num_documents, IS_PACKED: tl.constexpr):
    """Document and first token of ``token``, and whether a document has it."""
    is_there = token < num_tokens
    if IS_PACKED:
        n = tl.load(document + token, mask=is_there, other=0)
        is_there = is_there & (n < num_documents)
        start = tl.load(cu_seqlens + n, mask=is_there, other=0).to(tl.int32)
    else:
        n, start = row, token * 0
    return n, start, is_there


@triton.jit
def places_of(
    cu_seqlens, document, row, token, num_tokens, num_documents, COUNT: tl.constexpr, IS_PACKED: tl.constexpr
):  # fmt: skip
    """``place_of`` of ``COUNT`` tokens from ``token`` on, three tuples."""
    documents, starts, there = (), (), ()
    for i in tl.static_range(COUNT):
        n, start, is_there = place_of(
            cu_seqlens, document, row, token + i, num_tokens, num_documents, IS_PACKED
        )
        documents, starts, there = documents + (n,), starts + (start,), there + (is_there,)
    return documents, starts, there


@triton.jit
def tokens_of(x, x_t, token, end, m_D, COUNT: tl.constexpr):
    """``COUNT`` tokens from ``token`` on, ``[BLOCK]`` each, zeros from ``end`` on."""
    x = x + tl.cast(token, tl.int64) * x_t
    loaded = ()
    for i in tl.static_range(COUNT):
        m = mask_if(m_D, token + i < end)
        loaded = loaded + (tl.load(x + tl.cast(x_t, tl.int64) * i, mask=m, other=0.0),)
    return loaded


@triton.jit
def history_of(state, n, is_read, m_D, num_channels, slot, W: tl.constexpr):
    """``[BLOCK]`` float32 in a ``slot`` of a document's history."""
    state = state + (tl.cast(n, tl.int64) * (W - 1) + slot) * num_channels
    return tl.load(state, mask=mask_if(m_D, is_read), other=0.0).to(tl.float32)


@triton.jit
def inputs_before(
    x, x_t, state, token, n, start, is_there, m_D, num_channels,
    W: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """``seen`` by ``token``, a run's first: what its document has there, else its history, or zeros."""
    seen = ()
    for k in tl.static_range(W - 1):
        last = token - (W - 1) + k
        m = mask_if(m_D, is_there & (last >= start))
        found = tl.load(x + tl.cast(last, tl.int64) * x_t, mask=m, other=0.0).to(tl.float32)
        if HAS_STATE:
            slot = W - 1 + last - start
            is_read = is_there & (last < start) & (slot >= 0)  # offsets that are wrong lead nowhere else
            found += history_of(state, n, is_read, m_D, num_channels, slot, W)
        seen = seen + (found,)
    return seen


@triton.jit
def restarted(
    seen, state, n, is_first, m_D, num_channels, W: tl.constexpr, HAS_STATE: tl.constexpr
):  # fmt: skip
    """``seen`` by a token that may be the first of its document."""
    found = ()
    for k in tl.static_range(W - 1):
        old = 0.0
        if HAS_STATE:
            old = history_of(state, n, is_first, m_D, num_channels, k, W)
        found = found + (tl.where(is_first, old, seen[k]),)
    return found


@triton.jit
def before_activation(filters, seen, W: tl.constexpr):
    """p of the token that ``seen``, W of them here, ends with: ``[BLOCK]`` float32."""
    p = seen[W - 1] * filters[W - 1] + filters[W]
    for k in tl.static_range(W - 1):
        p += seen[k] * filters[k]
    return p


@triton.jit
def gate_of(p):
    """sigmoid(p), as the square of a root: a third of the instructions of tl.sigmoid, whose division minds extremes."""
    root = tl.rsqrt(1 + tl.exp2(p * -1.4426950408889634))
    return root * root


@triton.jit
def gradient_before_activation(filters, seen, dy, is_there, W: tl.constexpr, SILU: tl.constexpr):
    """dp of the token that ``seen``, W of them here, ends with: ``[BLOCK]`` float32, zero if no document has it."""
    dp = dy.to(tl.float32)
    if SILU:
        p = before_activation(filters, seen, W)
        gate = gate_of(p)
        dp *= gate * (1 + p * (1 - gate))
    return tl.where(is_there, dp, 0.0)


@triton.jit
def spread(filters, pending, dp, token, start, W: tl.constexpr, IS_PACKED: tl.constexpr):
    """The gradients of the W inputs that ``token`` saw; the first of them is complete then."""
    found = ()
    for k in tl.static_range(W - 1):
        term = dp
        if IS_PACKED:  # inputs of another document it has not seen
            term = tl.where(start <= token - (W - 1 - k), dp, 0.0)
        found = found + (pending[k] + term * filters[k],)
    return found + (dp * filters[W - 1],)


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """So many ``[BLOCK]`` float32."""
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + (tl.zeros([BLOCK], tl.float32),)
    return found


@triton.jit(do_not_specialize=["num_tokens", "num_documents", "num_runs", "zero"])
def conv_forward_kernel(
    x, weight, bias, state, cu_seqlens, document, y,
    num_tokens, num_documents, num_groups, num_runs, zero, x_b, x_t,
    X_G: tl.constexpr, W: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, RUN: tl.constexpr, AHEAD: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """y ``[B, T, G, D]``, contiguous. Grid: B * R * blocks, blocks of one run together."""
    num_channels = num_groups * D
    blocks = tl.cdiv(num_channels, BLOCK)
    run = tl.program_id(0) // blocks
    row, token = run // num_runs, run % num_runs * RUN
    group, place, channel, m_D = channels_of(
        tl.program_id(0) % blocks, num_groups, 0, zero, D, D, BLOCK, WIDE
    )
    filters = filters_of(weight, bias, channel, m_D, W, HAS_BIAS)
    x += row.to(tl.int64) * x_b + group * X_G + place
    y += row.to(tl.int64) * num_tokens * num_channels + channel
    state += channel
    n, start, is_there = place_of(cu_seqlens, document, row, token, num_tokens, num_documents, IS_PACKED)
    seen = inputs_before(x, x_t, state, token, n, start, is_there, m_D, num_channels, W, HAS_STATE)
    end = tl.minimum(token + RUN, num_tokens)
    loaded = tokens_of(x, x_t, token, end, m_D, AHEAD)
    documents, starts, there = places_of(
        cu_seqlens, document, row, token, num_tokens, num_documents, AHEAD, IS_PACKED
    )  # fmt: skip
    for now in range(token, end, AHEAD):
        loaded_next = tokens_of(x, x_t, now + AHEAD, end, m_D, AHEAD)
        documents_next, starts_next, there_next = places_of(
            cu_seqlens, document, row, now + AHEAD, num_tokens, num_documents, AHEAD, IS_PACKED
        )
        to = y + tl.cast(now, tl.int64) * num_channels
        for i in tl.static_range(AHEAD):
            if IS_PACKED:
                is_first = there[i] & (starts[i] == now + i)
                seen = restarted(seen, state, documents[i], is_first, m_D, num_channels, W, HAS_STATE)
            seen = seen + (loaded[i].to(tl.float32),)
            p = before_activation(filters, seen, W)
            if SILU:
                p *= gate_of(p)
            if IS_PACKED:
                p = tl.where(there[i], p, 0.0)
            m = mask_if(m_D, now + i < num_tokens)
            tl.store(to + tl.cast(num_channels, tl.int64) * i, p.to(y.dtype.element_ty), mask=m)
            seen = seen[1:]
        loaded, documents, starts, there = loaded_next, documents_next, starts_next, there_next


@triton.jit(do_not_specialize=["num_tokens", "num_documents", "num_runs", "zero"])
def conv_backward_kernel(
    x, weight, bias, state, cu_seqlens, document, dy, dx, parts,
    num_tokens, num_documents, num_groups, num_runs, zero, x_b, x_t, dy_b, dy_t, dx_b, dx_t, first,
    X_G: tl.constexpr, DY_G: tl.constexpr, DX_G: tl.constexpr, W: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, RUN: tl.constexpr, AHEAD: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """dx, and dweight and dbias of each run, ``parts`` ``[B * R, W + 1, G * C]``. Grid: as forward.

    Of D of C channels from ``first`` on: x, dy and dx, ``[B, T, G, D]``, have no others.
    """
    num_channels = num_groups * C
    blocks = tl.cdiv(num_groups * D, BLOCK)
    run = tl.program_id(0) // blocks
    row, token = run // num_runs, run % num_runs * RUN
    group, place, channel, m_D = channels_of(
        tl.program_id(0) % blocks, num_groups, first, zero, D, C, BLOCK, WIDE
    )
    filters = filters_of(weight, bias, channel, m_D, W, HAS_BIAS)
    x += row.to(tl.int64) * x_b + group * X_G + place
    dy += row.to(tl.int64) * dy_b + group * DY_G + place
    dx += row.to(tl.int64) * dx_b + group * DX_G + place
    state += channel
    n, start, is_there = place_of(cu_seqlens, document, row, token, num_tokens, num_documents, IS_PACKED)
    seen = inputs_before(x, x_t, state, token, n, start, is_there, m_D, num_channels, W, HAS_STATE)
    pending, sums = zeros(W - 1, BLOCK), zeros(W + 1, BLOCK)
    loaded = tokens_of(x, x_t, token, num_tokens, m_D, AHEAD)
    grads = tokens_of(dy, dy_t, token, num_tokens, m_D, AHEAD)
    documents, starts, there = places_of(
        cu_seqlens, document, row, token, num_tokens, num_documents, AHEAD, IS_PACKED
    )  # fmt: skip
    steps = tl.cdiv(tl.minimum(RUN, num_tokens - token), AHEAD)
    for step in range(steps):
        now = token + step * AHEAD
        loaded_next = tokens_of(x, x_t, now + AHEAD, num_tokens, m_D, AHEAD)
        grads_next = tokens_of(dy, dy_t, now + AHEAD, num_tokens, m_D, AHEAD)
        documents_next, starts_next, there_next = places_of(
            cu_seqlens, document, row, now + AHEAD, num_tokens, num_documents, AHEAD, IS_PACKED
        )
        to = dx + tl.cast(now - (W - 1), tl.int64) * dx_t
        for i in tl.static_range(AHEAD):
            if IS_PACKED:
                is_first = there[i] & (starts[i] == now + i)
                seen = restarted(seen, state, documents[i], is_first, m_D, num_channels, W, HAS_STATE)
            seen = seen + (loaded[i].to(tl.float32),)
            dp = gradient_before_activation(filters, seen, grads[i], there[i], W, SILU)
            added = ()
            for k in tl.static_range(W):
                added = added + (sums[k] + dp * seen[k],)
            sums = added + (sums[W] + dp,)
            pending = spread(filters, pending, dp, now + i, starts[i], W, IS_PACKED)
            done = now + (i - (W - 1))  # before the run's first token, it is the last run's
            m = mask_if(m_D, (done >= token) & (done < num_tokens))
            tl.store(to + tl.cast(dx_t, tl.int64) * i, pending[0].to(dx.dtype.element_ty), mask=m)
            seen, pending = seen[1:], pending[1:]
        loaded, grads = loaded_next, grads_next
        documents, starts, there = documents_next, starts_next, there_next
    now = token + steps * AHEAD
    to = dx + tl.cast(now - (W - 1), tl.int64) * dx_t
    for i in tl.static_range(W - 1):  # of the next run, for the gradients of this one's last tokens
        if IS_PACKED:
            is_first = there[i] & (starts[i] == now + i)
            seen = restarted(seen, state, documents[i], is_first, m_D, num_channels, W, HAS_STATE)
        seen = seen + (loaded[i].to(tl.float32),)
        dp = gradient_before_activation(filters, seen, grads[i], there[i], W, SILU)
        pending = spread(filters, pending, dp, now + i, starts[i], W, IS_PACKED)
        m = mask_if(m_D, now + (i - (W - 1)) < num_tokens)
        tl.store(to + tl.cast(dx_t, tl.int64) * i, pending[0].to(dx.dtype.element_ty), mask=m)
        seen, pending = seen[1:], pending[1:]
    parts += run.to(tl.int64) * (W + 1) * num_channels + channel
    for k in tl.static_range(W + 1):
        tl.store(parts + k * num_channels, sums[k], mask=m_D)


@triton.jit(do_not_specialize=["num_tokens"])
def conv_pass_kernel(
    dy, dx, num_tokens, num_groups, dy_b, dy_t, dx_b, dx_t,
    DY_G: tl.constexpr, DX_G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = dy, of channels without filters. Grid: (B * blocks of tokens, blocks of channels)."""
    blocks = tl.cdiv(num_tokens, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i_T = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    i_D = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    group, place = (i_D // D).to(tl.int64)[None, :], (i_D % D)[None, :]
    m, i_T = (i_T < num_tokens)[:, None] & (i_D < num_groups * D)[None, :], i_T.to(tl.int64)[:, None]
    b_dy = tl.load(dy + b * dy_b + i_T * dy_t + group * DY_G + place, mask=m, other=0.0)
    tl.store(dx + b * dx_b + i_T * dx_t + group * DX_G + place, b_dy, mask=m)


@triton.jit(do_not_specialize=["num_tokens", "num_documents", "num_runs", "zero"])
def conv_history_kernel(
    x, weight, bias, state, cu_seqlens, document, dy, d_state,
    num_tokens, num_documents, num_groups, num_runs, zero, x_b, x_t, dy_b, dy_t, first,
    X_G: tl.constexpr, DY_G: tl.constexpr, W: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
    SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """d_state ``[N, W - 1, G * C]``: what the first tokens of each document read of its history. Grid: N * blocks."""
    num_channels = num_groups * C
    blocks = tl.cdiv(num_groups * D, BLOCK)
    n = tl.program_id(0) // blocks
    group, place, channel, m_D = channels_of(
        tl.program_id(0) % blocks, num_groups, first, zero, D, C, BLOCK, WIDE
    )
    filters = filters_of(weight, bias, channel, m_D, W, HAS_BIAS)
    x, dy = x + (group * X_G + place), dy + (group * DY_G + place)
    state, d_state = state + channel, d_state + channel
    if IS_PACKED:
        token = tl.load(cu_seqlens + n).to(tl.int32)
        end = tl.minimum(tl.load(cu_seqlens + n + 1).to(tl.int32), num_tokens)
    else:
        token, end = n * 0, num_tokens
        x += n.to(tl.int64) * x_b
        dy += n.to(tl.int64) * dy_b
    loaded = tokens_of(x, x_t, token, end, m_D, W - 1)
    grads = tokens_of(dy, dy_t, token, end, m_D, W - 1)
    seen, pending = (), zeros(W - 1, BLOCK)
    for k in tl.static_range(W - 1):
        seen = seen + (history_of(state, n, n >= 0, m_D, num_channels, k, W),)
    for i in tl.static_range(W - 1):
        seen = seen + (loaded[i].to(tl.float32),)
        dp = gradient_before_activation(filters, seen, grads[i], token + i < end, W, SILU)
        pending = spread(filters, pending, dp, token, token, W, False)
        slot = (n.to(tl.int64) * (W - 1) + i) * num_channels
        tl.store(d_state + slot, pending[0].to(d_state.dtype.element_ty), mask=m_D)
        seen, pending = seen[1:], pending[1:]

"""The public kernels: arguments checked, then handed to the backend that :mod:`linear_moe.kernels.dispatch` picks.

    diagonal   S_t = a_t * S_{t-1} + k_t v_t^T                          o_t = scale * S_t^T q_t
    delta      S'  = a_t * S_{t-1},  S_t = S' - beta_t k_t (k_t^T S') + beta_t k_t v_t^T
    dplr       S_t = exp(log_decay_t) * S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T

Letters: B batch, T tokens, Hqk query/key heads (a divisor of H: head h uses h // (H // Hqk)), H heads, K key dim,
V value dim, N documents (B when not packed), W convolution width, C channels (any number of dims).
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from linear_moe.kernels import checks, dispatch
from linear_moe.kernels.arriving import State
from linear_moe.kernels.conv import cut
from linear_moe.kernels.segment import Segment


def diag_decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    log_decay_v: Tensor | None = None,
    bonus: Tensor | None = None,
    scale: float = 1.0,
    state: State = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Read and write a memory that decays element by element.

    Differentiable (once) in every tensor, through both results. Computes in float32, or float64 for float64 inputs
    (matmuls in TF32 only where ``torch.backends.cuda.matmul.allow_tf32`` says so; autocast is ignored); fused kernels
    multiply inputs of half precision in their dtype, and add up in float32 (docs/kernels.md, Precision). For the
    backward pass chunked torch keeps the inputs alone, the fused kernels states of chunks besides. Any strides.

    Args:
        q: ``[B, T, Hqk, K]``, any float dtype, the same for k and v.
        k: ``[B, T, Hqk, K]``.
        v: ``[B, T, H, V]``. K and V up to 256.
        log_decay: natural log of a_t, at most 0 (``-inf`` forgets): ``None`` (no decay), ``[H]``, ``[B, T, H]`` or
            ``[B, T, H, K]``. Any float dtype; float32 is worth its memory, since it is summed over the sequence.
        log_decay_v: ``[B, T, H, V]``, the log decay of the memory's columns. Not together with ``bonus``.
        bonus: ``[H, K]``, u: o_t reads ``S_{t-1} + (u * k_t) v_t^T``, and a_t applies after the read.
        scale: of the output.
        state: ``[N, H, K, V]``, the memory before the first token; ``None``: empty. Or a function that waits for it and
            returns it: called once, after the work that needs no memory has been started.
        cu_seqlens: ``[N + 1]``, int32 or int64, with B == 1: document n is tokens ``cu_seqlens[n]`` to
            ``cu_seqlens[n + 1]``; may be empty. Tokens after the last document give zeros.

    Returns:
        ``[B, T, H, V]`` in v's dtype, and the memory after the last token of each document, ``[N, H, K, V]``,
        float32 (float64 for float64 inputs).

    Raises:
        ValueError: a shape, dtype or device does not fit; on a CPU, where values can be looked at without waiting, a
            log decay is positive or documents run backwards.
    """
    check = partial(checks.check_diag_decay, q, k, v, log_decay, state, cu_seqlens, log_decay_v, bonus)
    state = checks.on_arrival(state, k, v, cu_seqlens)
    options = dict(log_decay_v=log_decay_v, bonus=bonus, scale=scale, state=state, cu_seqlens=cu_seqlens)
    return dispatch.run_checked("diag_decay", check, v, q, k, v, log_decay, **options)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    state: State = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Read a memory that erases what it stores under a key before it writes there.

    As :func:`diag_decay`, with ``beta`` ``[B, T, H]``, the strength of erase and write, in any float dtype. The decay
    applies before the erase. Keys are used as they are: normalise them, or the memory can grow without bound.
    """
    check = partial(checks.check_delta_rule, q, k, v, log_decay, state, cu_seqlens, beta)
    state = checks.on_arrival(state, k, v, cu_seqlens)
    return dispatch.run_checked(
        "delta_rule", check, v, q, k, v, beta, log_decay, scale=scale, state=state, cu_seqlens=cu_seqlens
    )


def dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    state: State = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Read a memory whose transition is a diagonal plus a low-rank (here rank-1) part, as in RWKV7.

    As :func:`diag_decay`, with ``a`` and ``b`` ``[B, T, Hqk, K]`` in any float dtype: what the memory holds under
    ``a``, read before the decay of this token, is added under ``b``. RWKV7 (arXiv:2503.14456) passes
    ``a = -kappa_hat`` and ``b = kappa_hat * iclr``. They are used as they are: a transition that stretches makes the
    memory grow without bound.
    """
    check = partial(checks.check_dplr_delta_rule, q, k, v, log_decay, state, cu_seqlens, a, b)
    state = checks.on_arrival(state, k, v, cu_seqlens)
    options = dict(scale=scale, state=state, cu_seqlens=cu_seqlens)
    return dispatch.run_checked("dplr_delta_rule", check, v, q, k, v, a, b, log_decay, **options)


def diag_decay_segment(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    log_decay_v: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Segment:
    """What each row, or each packed document, does to any memory; arguments as in :func:`diag_decay`.

    Returns:
        ``state`` ``[N, H, K, V]`` and ``log_decay`` ``[N, H, K | 1, V | 1]`` (``None`` without any decay), such that
        ``carry(state)`` is the memory that :func:`diag_decay` would return. Empty documents give the identity.
    """
    check = partial(checks.check_diag_decay, None, k, v, log_decay, None, cu_seqlens, log_decay_v)
    return dispatch.run_checked(
        "diag_decay_segment", check, v, k, v, log_decay, log_decay_v=log_decay_v, cu_seqlens=cu_seqlens
    )


def delta_rule_segment(
    k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None, *, cu_seqlens: Tensor | None = None
) -> Segment:
    """What each row, or each packed document, does to any memory; arguments as in :func:`delta_rule`.

    Returns:
        ``state`` ``[N, H, K, V]`` and the dense ``decay`` ``[N, H, K, K]``, such that ``carry(state)`` is the memory
        that :func:`delta_rule` would return. Empty documents give the identity.
    """
    check = partial(checks.check_delta_rule, None, k, v, log_decay, None, cu_seqlens, beta)
    return dispatch.run_checked("delta_rule_segment", check, v, k, v, beta, log_decay, cu_seqlens=cu_seqlens)


def dplr_delta_rule_segment(
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Segment:
    """What each row, or each packed document, does to any memory; arguments as in :func:`dplr_delta_rule`.

    Returns:
        ``state`` ``[N, H, K, V]`` and the dense ``decay`` ``[N, H, K, K]``, such that ``carry(state)`` is the memory
        that :func:`dplr_delta_rule` would return. Empty documents give the identity.
    """
    check = partial(checks.check_dplr_delta_rule, None, k, v, log_decay, None, cu_seqlens, a, b)
    return dispatch.run_checked(
        "dplr_delta_rule_segment", check, v, k, v, a, b, log_decay, cu_seqlens=cu_seqlens
    )


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution: ``y_t = act(bias + sum_j weight[..., j] * x_{t - (W - 1) + j})``.

    Args:
        x: ``[B, T, *C]``, any float dtype; summed in float32 (float64 for float64).
        weight: ``[*C, W]``; the last tap is the token itself.
        bias: ``[*C]``.
        activation: ``None`` or ``"silu"``.
        state: ``[N, W - 1, *C]``, the inputs before the first token, oldest first; ``None``: zeros.
        cu_seqlens: as in :func:`diag_decay`.

    Returns:
        ``[B, T, *C]``, and the last W - 1 inputs of each row or document, ``[N, W - 1, *C]`` (with those of
        ``state`` when there were fewer). Both in x's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check = partial(checks.check_conv, x, weight, bias, activation, state, cu_seqlens)
    options = dict(activation=activation, state=state, cu_seqlens=cu_seqlens)
    return dispatch.run_checked("short_conv", check, x, x, weight, bias, **options)


def conv_and_split(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    widths: tuple[int, ...],
    activation: str | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """:func:`short_conv` of the first channels of every head of a fused projection, and the projections one by one.

    As the two in a row, but the gradients of the projections need no pass of their own to lie side by side.

    Args:
        x: ``[B, T, H, D]``, any float dtype.
        weight: ``[H, C, W]``, of the first C channels.
        bias: ``[H, C]``.
        widths: of the projections in the order of their channels, D in all; the first ones are C together.
        activation: as in :func:`short_conv`, as are the others.
        state: ``[N, W - 1, H, C]``.
        cu_seqlens: as in :func:`diag_decay`.

    Returns:
        ``[B, T, H, width]`` for each of ``widths``, and the last W - 1 inputs of the convolution, ``[N, W - 1, H, C]``.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check = partial(checks.check_conv_and_split, x, weight, bias, widths, activation, state, cu_seqlens)
    options: dict[str, Any] = dict(activation=activation, state=state, cu_seqlens=cu_seqlens)
    if torch.is_grad_enabled():
        return cast(
            tuple[Tensor, ...],
            dispatch.run_checked(
                "conv_and_split", check, x, x, weight, bias, widths=tuple(widths), **options
            ),
        )
    check()
    head, others = x.tensor_split([weight.shape[1]], dim=-1)
    y, final = short_conv(head, weight, bias, **options)
    return *cut(y, others, tuple(widths)), final


def gated_rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    activation: str = "swish",
    eps: float = 1e-6,
    scale: float = 1.0,
) -> Tensor:
    """RMS norm of each head, its weight and a gate: ``x / sqrt(mean(x^2) + eps) * scale * weight * act(gate)``.

    Computes in float32, or float64 for float64 inputs, and keeps only its inputs for the backward pass.

    Args:
        x: ``[B, T, H, D]``, any float dtype, any strides.
        weight: ``[D]``, or ``[H, D]``; ``None``: ones.
        gate: ``[B, T, H, D]``; ``None``: no gate.
        activation: of the gate, ``"swish"`` or ``"sigmoid"``.
        eps: added to the mean square.
        scale: of the result.

    Returns:
        ``[B, T, H, D]`` in x's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check = partial(checks.check_gated_norm, x, weight, gate, activation)
    return dispatch.run_checked(
        "gated_rms_norm", check, x, x, weight, gate, activation=activation, eps=eps, scale=scale
    )


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """RMS norm of tokens, ``x / sqrt(mean(x^2) + eps) * weight``, and x itself, for whoever adds to it.

    The gradient of x is that of the norm plus that of what was passed on: where a residual stream goes by the norm, the
    two are added in the norm's backward pass, and not by one of their own. Computes in float32, or float64 for float64
    inputs, and keeps only its inputs for the backward pass.

    Args:
        x: ``[B, T, D]``, any float dtype, any strides.
        weight: ``[D]``.
        eps: added to the mean square.

    Returns:
        ``[B, T, D]`` in x's dtype, and x.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check = partial(checks.check_norm, x, weight)
    return cast(tuple[Tensor, Tensor], dispatch.run_checked("rms_norm", check, x, x, weight, eps=eps))


def scale_heads(x: Tensor, weight: Tensor) -> Tensor:
    """Each head of a token times its number: ``weight[..., None] * x``.

    Computes in float32, or float64 for float64 inputs, and keeps only its inputs for the backward pass.

    Args:
        x: ``[B, T, H, V]``, any float dtype.
        weight: ``[B, T, H]``.

    Returns:
        ``[B, T, H, V]`` in x's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check = partial(checks.check_scaled, x, weight)
    return dispatch.run_checked("scale_heads", check, x, x, weight)


def rotate_heads(q: Tensor, k: Tensor, angles: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Rotary positions: q and k, channels ``i`` and ``R + i`` of each head turned by ``angles[..., i]``.

    Computes in float32, or float64 for float64 inputs, and keeps only the angles for the backward pass.

    Args:
        q: ``[B, T, H, K]``, any float dtype, any strides.
        k: ``[B, T, G, K]``.
        angles: ``[B, T, R]`` with ``2 R <= K``, constants; float64 counts. Channels from 2 R on are copied.
        scale: of what is turned (YaRN's temperature).

    Returns:
        q and k, turned, in their shapes and dtypes.

    Raises:
        ValueError: a shape, dtype or device does not fit, or ``angles`` wants a gradient.
    """
    check = partial(checks.check_rotary, q, k, angles)
    return dispatch.run_checked("rotate_heads", check, q, q, k, angles, scale=scale)


def skip_gate_norm(
    x: Tensor,
    skip: Tensor | None,
    skip_weight: Tensor | None,
    weight: Tensor,
    gate: Tensor | None = None,
    *,
    num_groups: int = 1,
    activation: str = "swish",
    eps: float = 1e-6,
) -> Tensor:
    """Mamba2's output: ``p = (x + skip_weight * skip) * act(gate)``, normed over a group of heads, times ``weight``.

    Computes in float32, or float64 for float64 inputs, and keeps only its inputs for the backward pass.

    Args:
        x: ``[B, T, H, V]``, any float dtype, any strides.
        skip: ``[B, T, H, V]``; ``None``: no skip, as where a norm over several heads is all there is.
        skip_weight: ``[H]``; ``None`` if ``skip`` is.
        weight: ``[H, V]``.
        gate: ``[B, T, H, V]``; ``None``: no gate.
        num_groups: groups of neighbouring heads with one RMS each; divides H.
        activation: of the gate, ``"swish"`` or ``"sigmoid"``.
        eps: added to the mean square.

    Returns:
        ``[B, T, H, V]`` in x's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check = partial(checks.check_skip_gate_norm, x, skip, skip_weight, weight, gate, num_groups, activation)
    options = dict(num_groups=num_groups, activation=activation, eps=eps)
    return dispatch.run_checked("skip_gate_norm", check, x, x, skip, skip_weight, weight, gate, **options)

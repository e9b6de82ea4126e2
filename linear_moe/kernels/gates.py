"""The public kernels that make decays of logits, and RWKV's: checked, then handed on as in ``ops``.

Letters: B batch, T tokens, H heads, K channels of a head's keys, V of its values; N mixes of D channels.
"""

from __future__ import annotations

from functools import partial
from typing import cast

from torch import Tensor

from linear_moe.kernels import checks_of_gates as checks
from linear_moe.kernels import dispatch


def log_decay_of(
    x: Tensor,
    rate: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    form: str = "softplus",
    scale: float = 1.0,
) -> Tensor:
    """Log decays from logits: ``-scale * rate * f(x + bias)``.

    Computes in float32, or float64 for float64 inputs, and keeps only its inputs for the backward pass.

    Args:
        x: ``[B, T, H, K]``, any float dtype, any strides.
        rate: ``[H]``; ``None``: ones.
        bias: ``[H, K]``; ``None``: zeros.
        form: f, ``"softplus"``, ``"log_sigmoid"`` (then ``-f`` is the log of a sigmoid), ``"sigmoid"`` or ``"exp"``.
        scale: of the result.

    Returns:
        ``[B, T, H, K]``, float32 (float64 for float64 x).

    Raises:
        ValueError: a shape, dtype, device or ``form`` does not fit.
    """
    check = partial(checks.check_log_decay_of, x, rate, bias, form)
    return dispatch.run_checked("log_decay_of", check, x, x, rate, bias, form=form, scale=scale)


def bounded_decay_of(x: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and log decays of gates with a lower bound: ``a = b + (1 - b) sigmoid(x)`` with ``b = sigmoid(bound)``.

    Computes in float32, or float64 for float64 inputs, without a difference of two numbers near 1, and keeps only its
    inputs for the backward pass.

    Args:
        x: ``[B, T, H, K]``, any float dtype, any strides; finite.
        bound: ``[H, K]``, the logit of b, which is ``log b - log(1 - b)``; -inf: b is 0.

    Returns:
        ``1 - a``, ``[B, T, H, K]`` in x's dtype, and ``log a``, never positive, in float32 (float64 for float64 x).

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check = partial(checks.check_bounded_decay_of, x, bound)
    return dispatch.run_checked("bounded_decay_of", check, x, x, bound)


def lerp_tokens(
    x: Tensor,
    other: Tensor,
    weight: Tensor | None = None,
    logits: Tensor | None = None,
    *,
    activation: str | None = None,
) -> tuple[Tensor, ...]:
    """Mixes of two tensors: ``x + m_n * (other - x)`` for each of N, with ``m_n = act(weight_n + logits_n)``.

    Computes in float32, or float64 for float64 inputs, and keeps only its inputs for the backward pass.

    Args:
        x: ``[B, T, D]``, any float dtype, any strides.
        other: ``[B, T, D]``, such as the token before each one.
        weight: ``[N, D]``; ``None``: zeros.
        logits: ``[B, T, N, D]``; ``None``: zeros, and then there is ``weight``.
        activation: ``"sigmoid"``, or ``None`` for none.

    Returns:
        N tensors ``[B, T, D]`` in x's dtype.

    Raises:
        ValueError: a shape, dtype, device or ``activation`` does not fit.
    """
    check = partial(checks.check_lerp_tokens, x, other, weight, logits, activation)
    found = dispatch.run_checked("lerp_tokens", check, x, x, other, weight, logits, activation=activation)
    return cast(tuple[Tensor, ...], found)


def edit_keys(k: Tensor, logits: Tensor, scale: Tensor, strength: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What RWKV7 writes under, what it removes, and what it adds back for that, at a learning rate per channel.

    With ``s = sigmoid(logits)`` and n the unit vector of ``scale * k``: ``k * (1 + (s - 1) * strength)``, ``-n`` and
    ``s * n``, the k, a and b of :func:`linear_moe.kernels.dplr_delta_rule`. Computes in float32, or float64 for float64
    inputs, and keeps only its inputs for the backward pass.

    Args:
        k: ``[B, T, H, K]``, any float dtype, any strides.
        logits: ``[B, T, H, K]``, of the learning rates.
        scale: ``[H, K]``.
        strength: ``[H, K]``, how much of the written key its learning rate takes away.

    Returns:
        Three tensors ``[B, T, H, K]`` in k's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check = partial(checks.check_edit_keys, k, logits, scale, strength)
    return cast(
        tuple[Tensor, Tensor, Tensor], dispatch.run_checked("edit_keys", check, k, k, logits, scale, strength)
    )


def gated_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor | None = None,
    q: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    bonus: Tensor | None = None,
    *,
    activation: str | None = "swish",
    eps: float = 1e-5,
) -> Tensor:
    """Mean 0 and variance 1 of each head, what a token reads of its own, a gate: RWKV's output.

    ``((x - mean(x)) / sqrt(var(x) + eps) * weight + bias + sum(q * bonus * k) * v) * act(gate)``. Computes in float32,
    or float64 for float64 inputs, and keeps only its inputs for the backward pass.

    Args:
        x: ``[B, T, H, V]``, any float dtype, any strides.
        weight: ``[H, V]``.
        bias: ``[H, V]``.
        gate: ``[B, T, H, V]``; ``None``: no gate.
        q: ``[B, T, H, K]``; ``None``: a token reads nothing of its own, and has no k, v and bonus.
        k: ``[B, T, H, K]``.
        v: ``[B, T, H, V]``.
        bonus: ``[H, K]``.
        activation: of the gate, ``"swish"``, ``"sigmoid"`` or ``None``.
        eps: added to the variance.

    Returns:
        ``[B, T, H, V]`` in x's dtype.

    Raises:
        ValueError: a shape, dtype, device or ``activation`` does not fit.
    """
    check = partial(checks.check_gated_group_norm, x, weight, bias, gate, q, k, v, bonus, activation)
    options = dict(activation=activation, eps=eps)
    found = dispatch.run_checked(
        "gated_group_norm", check, x, x, weight, bias, gate, q, k, v, bonus, **options
    )
    return cast(Tensor, found)

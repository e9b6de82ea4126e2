"""The public kernels that make decays of logits: checked, then handed on as in ``ops``.

Letters: B batch, T tokens, H heads, K channels of a head.
"""

from __future__ import annotations

from torch import Tensor

from linear_moe.kernels import checks, dispatch


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
    checks.check_log_decay_of(x, rate, bias, form)
    return dispatch.run("log_decay_of", x, x, rate, bias, form=form, scale=scale)


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
    checks.check_bounded_decay_of(x, bound)
    return dispatch.run("bounded_decay_of", x, x, bound)

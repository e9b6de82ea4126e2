"""The public kernels of tokens in any order, of the loss and of experts: checked, then handed on as in ``ops``.

Letters: M tokens or experts' rows, V logits, S tokens, k slots of a token, F width of a gated unit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from linear_moe.kernels import checks, dispatch
from linear_moe.kernels.cross_entropy import Statistics


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor,
    *,
    combine: Callable[[Statistics], Statistics] | None = None,
) -> Tensor:
    """Cross entropy of each token, with the logits overwritten by their gradient.

    Not differentiable: the gradient of ``(weight * loss).sum()`` is what ``logits`` holds afterwards.

    Args:
        logits: ``[M, V]``, contiguous rows, any float dtype.
        labels: ``[M]`` int64. One outside of [0, V) is in another slice of the vocabulary, and its logit counts as 0.
        weight: ``[M]``, float32 (float64 for float64 logits): factor of each token's gradient, not of its loss.
        combine: makes statistics of this slice of the vocabulary those of all slices.

    Returns:
        ``[M]``, float32 (float64 for float64 logits).

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check = partial(checks.check_cross_entropy, logits, labels, weight)
    return dispatch.run_checked("cross_entropy_", check, logits, logits, labels, weight, combine=combine)


def spread_rows(x: Tensor, order: Tensor, place: Tensor) -> Tensor:
    """Give each of a token's slots its row: ``y[place[t, j]] = x[t]``.

    Args:
        x: ``[S, ...]``, tokens; any dtype.
        order: ``[S * k]`` int64, the inverse of ``place``: slot ``t * k + j`` of each place.
        place: ``[S, k]`` int64, a permutation of all ``S * k`` places.

    Returns:
        ``[S * k, ...]`` in x's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check = partial(checks.check_rows, x, order, place, of_slots=False)
    return dispatch.run_checked("spread_rows", check, x, x, order, place)


def collect_rows(x: Tensor, order: Tensor, place: Tensor, weight: Tensor | None = None) -> Tensor:
    """Add up each token's slots: ``y[t] = sum_j weight[t, j] * x[place[t, j]]``.

    Args:
        x: ``[S * k, ...]``, any float dtype.
        order: as in :func:`spread_rows`.
        place: as in :func:`spread_rows`.
        weight: ``[S, k]``; ``None``: ones.

    Returns:
        ``[S, ...]`` in x's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check = partial(checks.check_rows, x, order, place, of_slots=True, weight=weight)
    return dispatch.run_checked("collect_rows", check, x, x, order, place, weight)


def weighted_swiglu(x: Tensor, weight: Tensor) -> Tensor:
    """An expert's gated unit times the router's probability: ``weight * silu(x[:, :F]) * x[:, F:]``.

    Computes in float32, or float64 for float64 inputs, and keeps only its inputs for the backward pass.

    Args:
        x: ``[M, 2 F]``, gate and up; any float dtype.
        weight: ``[M]``.

    Returns:
        ``[M, F]`` in x's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    check = partial(checks.check_swiglu, x, weight)
    return dispatch.run_checked("weighted_swiglu", check, x, x, weight)

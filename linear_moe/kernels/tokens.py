"""The public kernels of tokens in any order, of the loss and of experts: checked, then handed on as in ``ops``.

Letters: M tokens or experts' rows, V logits, S or N tokens, E experts, k slots of a token, F width of a gated unit.
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


def choose_experts(
    x: Tensor,
    per_token: int,
    *,
    among_chosen: bool = False,
    factor: float = 1.0,
    is_token: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The experts of each token, with probabilities, and what a balance loss is made of, in one pass.

        s = softmax(x),    p = factor * s, or factor * softmax of the chosen logits, where chosen; else 0

    Args:
        x: ``[N, E]``, logits; any float dtype, computed in float32 (float64 for float64).
        per_token: k, the largest logits of each token. Of equal ones any may be chosen.
        among_chosen: whether probabilities are the softmax over a token's chosen experts only.
        factor: of probabilities.
        is_token: ``[N]`` bool, False for padding, which does not count in the sums; ``None``: all do.

    Returns:
        Probabilities ``[N, E]`` in x's dtype, the choice ``[N, E]`` bool, the sum over tokens of s ``[E]``, and how
        many tokens chose each expert ``[E]``, both float32 (float64 for float64). Gradients flow through the first and
        the third.

    Raises:
        ValueError: a shape, dtype, device or number does not fit.
    """
    check = partial(checks.check_choice, x, per_token, is_token)
    return dispatch.run_checked(  # type: ignore[no-any-return]
        "choose_experts", check, x, x, per_token, among_chosen=among_chosen, factor=factor, is_token=is_token
    )


def sort_slots(chosen: Tensor, probs: Tensor, per_token: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slots sorted by expert, stably: what :func:`spread_rows` and :func:`collect_rows` need, without waiting.

    Args:
        chosen: ``[N, E]`` bool, the experts of each token. Where they are fewer than k (of padding), the first others
            count, too; where they are more, the first k.
        probs: ``[N, E]``, any float dtype.
        per_token: k.

    Returns:
        ``order`` ``[N * k]`` and ``place`` ``[N, k]``, int64, the slots of a token in the order of its experts; how
        many slots each expert has, ``[E]``, int32 or int64; ``probs`` of the sorted slots ``[N * k]``, with gradients.

    Raises:
        ValueError: a shape, dtype, device or number does not fit.
    """
    check = partial(checks.check_slots, chosen, probs, per_token)
    return dispatch.run_checked("sort_slots", check, probs, chosen, probs, per_token)  # type: ignore[no-any-return]


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

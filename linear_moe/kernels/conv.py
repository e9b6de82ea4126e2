"""Depthwise causal convolution of a few tokens, the short convolution before most linear mixers.

    y_t = act(bias + sum_j weight_j * x_{t - (W - 1) + j})

One multiply-add over the tokens for each of the W taps, in float32 whatever the dtype of x (a bfloat16 sum of four
terms would round four times; the temporaries are dropped, so float32 costs no memory that stays).

Letters: B batch, T tokens, C channels (any number of dims), W width, N documents (B when not packed).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.kernels.recompute import recompute


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`linear_moe.kernels.short_conv`."""
    history = weight.shape[-1] - 1
    state = _no_inputs(x, history, cu_seqlens) if state is None else state.to(x.dtype)
    final = last_inputs(x, history, state, cu_seqlens)
    if cu_seqlens is None:
        (y,) = recompute(partial(_convolve, activation), None, (x,), (state, weight, bias))
    else:
        rows = _Rows.plan(cu_seqlens, x.shape[1], history)
        (y,) = recompute(partial(_convolve_packed, activation, rows), None, (x,), (state, weight, bias))
    return cast(Tensor, y), final


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
    """See :func:`linear_moe.kernels.conv_and_split`."""
    head, others = x.tensor_split([weight.shape[1]], dim=-1)
    y, final = short_conv(head, weight, bias, activation=activation, state=state, cu_seqlens=cu_seqlens)
    return *cut(y, others, widths), final


def cut(convolved: Tensor, others: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Views of ``widths`` channels each, of one tensor and then of another; none reaches from one into the other."""
    parts, first = [], 0
    for width in widths:
        behind = first - convolved.shape[-1]
        parts.append(convolved.narrow(-1, first, width) if behind < 0 else others.narrow(-1, behind, width))
        first += width
    return tuple(parts)


def last_inputs(x: Tensor, history: int, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The last ``history`` inputs of each row or document, ``[N, history, *C]``, with those of ``state`` before them.

    Looks at no value of ``cu_seqlens`` on the host, and touches only the tokens that it returns.
    """
    if cu_seqlens is None and state is None and history <= x.shape[1]:
        return x[:, x.shape[1] - history :].clone(memory_format=torch.contiguous_format)
    state = _no_inputs(x, history, cu_seqlens) if state is None else state
    if cu_seqlens is None:
        num_kept = min(history, x.shape[1])
        return torch.cat([state[:, num_kept:], x[:, x.shape[1] - num_kept :]], 1)
    cu = cu_seqlens.long()
    document_N1 = torch.arange(len(cu) - 1, device=cu.device).unsqueeze(-1)
    slot_W = torch.arange(history, device=cu.device)
    place_NW = cu.diff().unsqueeze(-1) + slot_W  # in the history followed by the tokens
    is_history = (place_NW < history).view(*place_NW.shape, *([1] * (x.ndim - 2)))
    slots = document_N1 * history + place_NW.clamp(max=max(0, history - 1))
    tokens = (cu[:-1].unsqueeze(-1) + place_NW - history).clamp(min=0)
    old = state.flatten(0, 1).index_select(0, slots.flatten()).view_as(state)
    new = x[0].index_select(0, tokens.flatten()).view_as(state)
    return torch.where(is_history, old, new)


def _no_inputs(x: Tensor, history: int, cu_seqlens: Tensor | None) -> Tensor:
    """What comes before the first token: ``[N, history, *C]``, zeros."""
    num_documents = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_zeros(num_documents, history, *x.shape[2:])


@dataclass(frozen=True)
class _Rows:
    """Packed documents laid out one after another, each after its own history of W - 1 inputs."""

    history: Tensor
    """``[N, W - 1]``, rows of the histories."""
    tokens: Tensor
    """``[T]``, rows of the tokens."""
    is_covered: Tensor
    """``[T]`` bool: the token belongs to a document."""

    @classmethod
    def plan(cls, cu_seqlens: Tensor, num_tokens: int, history: int) -> _Rows:
        """On the device, without waiting for it."""
        cu = cu_seqlens.long()
        num_documents = cu.shape[0] - 1
        token_T = torch.arange(num_tokens, device=cu.device)
        document_T = torch.searchsorted(cu[1:], token_T, right=True).clamp(max=num_documents - 1)
        document_N1 = torch.arange(num_documents, device=cu.device).unsqueeze(-1)
        slot_W = torch.arange(history, device=cu.device)
        start_N1 = cu[:-1].unsqueeze(-1)
        return cls(
            history=start_N1 + document_N1 * history + slot_W,
            tokens=token_T + (document_T + 1) * history,
            is_covered=token_T < cu[-1],
        )


def _convolve(
    activation: str | None, x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor]:
    """``[B, T, C]`` after ``[B, W - 1, C]`` to ``[B, T, C]``."""
    padded = torch.cat([state, x], 1)
    taps = [padded[:, j : j + x.shape[1]] for j in range(weight.shape[-1])]
    y = taps[0] * weight[..., 0]
    for tap, weight_C in zip(taps[1:], weight.unbind(-1)[1:]):
        y = torch.addcmul(y, tap, weight_C)
    if bias is not None:
        y = y + bias
    return (F.silu(y) if activation == "silu" else y,)


def _convolve_packed(
    activation: str | None, rows: _Rows, x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor]:
    """One convolution over all rows; outputs at a history mix two documents, and are not taken."""
    history = state.shape[1]
    row_of_input = torch.cat([rows.history.flatten(), rows.tokens])
    inputs = torch.cat([state.flatten(0, 1), x[0]])
    laid_out = torch.empty_like(inputs).index_copy(0, row_of_input, inputs).unsqueeze(0)
    (y,) = _convolve(activation, laid_out[:, history:], laid_out[:, :history], weight, bias)
    y = y.index_select(1, rows.tokens - history)
    is_covered = rows.is_covered.view(1, -1, *([1] * (y.ndim - 2)))
    return (torch.where(is_covered, y, 0.0),)

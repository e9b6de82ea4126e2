"""Depthwise causal convolution of a few tokens, the short convolution before most linear mixers.

    y_t = act(bias + sum_j weight_j * x_{t - (W - 1) + j})

One multiply-add over the tokens for each of the W taps, in float32 whatever the dtype of x (a bfloat16 sum of four
terms would round four times; the temporaries are dropped, so float32 costs no memory that stays).

Letters: B batch, T tokens, C channels (any number of dims), W width, N documents (B when not packed).
"""

from __future__ import annotations

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
    if state is None:
        num_documents = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state = x.new_zeros(num_documents, history, *x.shape[2:])
    core = partial(_convolve, activation)
    if cu_seqlens is None:
        padded = torch.cat([state.to(x.dtype), x], 1)
        (y,) = recompute(core, None, (padded,), (weight, bias))
        return cast(Tensor, y).to(x.dtype), padded[:, x.shape[1] :]

    # Lay each document out after its own history; then one convolution serves all, and the outputs at tokens are
    # right. Outputs at the history of a later document mix two documents, and are not taken.
    row_of_token, row_of_history, is_covered = _packed_rows(cu_seqlens, x.shape[1], history)
    rows = torch.cat([row_of_history.flatten(), row_of_token])
    padded = torch.cat([state.to(x.dtype).flatten(0, 1), x[0]])[torch.argsort(rows)].unsqueeze(0)
    (y,) = recompute(core, None, (padded,), (weight, bias))
    y = F.pad(cast(Tensor, y), (0, 0) * (x.ndim - 2) + (history, 0)).index_select(1, row_of_token)
    y = torch.where(is_covered.view(1, -1, *([1] * (x.ndim - 2))), y, 0.0).to(x.dtype)
    lengths_N1 = cu_seqlens.diff().unsqueeze(-1)
    return y, padded[0][row_of_history + lengths_N1]


def _packed_rows(cu_seqlens: Tensor, num_tokens: int, history: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where tokens ``[T]`` and histories ``[N, W - 1]`` go, and which tokens belong to a document, ``[T]``."""
    cu = cu_seqlens.long()
    num_documents = cu.shape[0] - 1
    token_T = torch.arange(num_tokens, device=cu.device)
    document_T = torch.searchsorted(cu[1:], token_T, right=True).clamp(max=num_documents - 1)
    document_N1 = torch.arange(num_documents, device=cu.device).unsqueeze(-1)
    slot_W = torch.arange(history, device=cu.device)
    row_of_history = cu[:-1].unsqueeze(-1) + document_N1 * history + slot_W
    return token_T + (document_T + 1) * history, row_of_history, token_T < cu[-1]


def _convolve(activation: str | None, padded: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor]:
    """``[B, W - 1 + T, C]`` to ``[B, T, C]``."""
    width = weight.shape[-1]
    num_outputs = padded.shape[1] - width + 1
    taps = [padded[:, j : j + num_outputs] for j in range(width)]
    y = taps[0] * weight[..., 0]
    for tap, weight_C in zip(taps[1:], weight.unbind(-1)[1:]):
        y = torch.addcmul(y, tap, weight_C)
    if bias is not None:
        y = y + bias
    return (F.silu(y) if activation == "silu" else y,)

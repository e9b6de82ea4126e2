"""From fused projections to named ones: biases, the short convolution, positions.

Letters: B rows, T tokens, N runs, H heads here, G groups here, W fused width, C channels, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.kernels import conv_and_split, short_conv
from linear_moe.lsm.tables import MixerState, Placement, Projection

if TYPE_CHECKING:
    from linear_moe.lsm.mixer import Mixer


def split(
    mixer: Mixer,
    x_BTHW: Tensor,
    others: dict[str, Tensor],
    w: dict[str, Tensor],
    place: Placement,
    state: MixerState,
    cu_seqlens: Tensor | None,
) -> tuple[dict[str, Tensor], tuple[Tensor | None, Tensor | None]]:
    """Every projection by name, biased and convolved, and the tails of both convolutions.

    Fused projections may come among ``others`` instead, if none is convolved.
    """
    taps = w.get("conv_weight"), w.get("conv_bias")
    fused = [p for p in mixer.fused_projections() if p.name not in others]
    named, tail = _convolved(fused, x_BTHW, w, taps, state.conv, cu_seqlens, mixer.conv_activation)
    group_tail = None
    if "groups" in others:
        here = mixer.groups_here(place)
        weight, bias = w.get("group_conv_weight"), w.get("group_conv_bias")
        taps = None if weight is None else weight[here], None if bias is None else bias[here]
        table = mixer.grouped_projections()
        grouped, group_tail = _convolved(
            table, others["groups"], w, taps, state.group_conv, cu_seqlens, mixer.conv_activation
        )
        named |= grouped
    return named | {name: x for name, x in others.items() if name != "groups"}, (tail, group_tail)


def conv_input(table: Sequence[Projection], head_BTHC: Tensor, w: dict[str, Tensor]) -> Tensor:
    """The channels of the convolution with their projections' biases, unless whoever made them has added those."""
    return biased([p for p in table if p.conv], head_BTHC, w)


def biased(table: Sequence[Projection], x_BTHW: Tensor, w: dict[str, Tensor]) -> Tensor:
    """Fused projections with those of their biases that ``w`` has, in one addition."""
    if not any(_has_bias(p, w) for p in table):
        return x_BTHW
    zeros = x_BTHW.new_zeros(())
    heads = x_BTHW.shape[2]
    biases = [w[f"{p.name}_bias"] if _has_bias(p, w) else zeros.expand(heads, p.width) for p in table]
    return x_BTHW + torch.cat(biases, dim=-1)


def _has_bias(p: Projection, w: dict[str, Tensor]) -> bool:
    return p.bias and f"{p.name}_bias" in w


def _convolved(
    table: Sequence[Projection],
    x_BTHW: Tensor,
    w: dict[str, Tensor],
    taps: tuple[Tensor | None, Tensor | None],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Named parts of one fused tensor, the first ones through the convolution, and its tail."""
    weight, bias = taps
    x_BTHW, widths, tail = biased(table, x_BTHW, w), tuple(p.width for p in table), None
    if weight is None:
        parts = cut(x_BTHW, widths)
    else:
        *parts, tail = conv_and_split(
            x_BTHW, weight, bias, widths=widths, activation=activation, state=state, cu_seqlens=cu_seqlens
        )
    return dict(zip([p.name for p in table], parts, strict=True)), tail


def cut(x_BTHW: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """``x.split(widths, dim=-1)``, whose gradients are laid side by side in one pass."""
    # Time first, as Megatron has it in memory, so that these need no copy.
    x_TBHW = x_BTHW.transpose(0, 1)
    found = _Parts.apply(tuple(widths), x_TBHW) if x_TBHW.requires_grad else x_TBHW.split(widths, dim=-1)
    return [part.transpose(0, 1) for part in found]


class _Parts(torch.autograd.Function):
    """``x.split(widths, dim=-1)``, whose gradients are laid side by side in words of up to 16 bytes.

    A GPU finds the place of every number of strided tensors by several divisions: of two bytes each, at a third of what
    its memory gives (10.4 ms of a step of 518, measured).
    """

    @staticmethod
    def forward(ctx: Any, widths: tuple[int, ...], x_TBHW: Tensor) -> tuple[Tensor, ...]:
        return x_TBHW.split(widths, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        if torch.is_grad_enabled():  # to be differentiated again, which words cannot
            return None, torch.cat(grads, dim=-1)
        rows = [grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads]
        words = (torch.complex128, torch.int64, torch.int32, grads[0].dtype)
        word = next(word for word in words if all(_has_words(x, word) for x in rows))
        return None, torch.cat([x.view(word) for x in rows], dim=-1).view(grads[0].dtype)


def _has_words(x: Tensor, word: torch.dtype) -> bool:
    """Whether each row of ``x`` consists of them, so that it can be viewed as such."""
    if word == x.dtype:
        return True
    number, rest = divmod(word.itemsize, x.itemsize)
    lengths = (x.storage_offset(), x.shape[-1], *x.stride()[:-1])
    return x.stride(-1) == 1 and rest == 0 and all(n % number == 0 for n in lengths)


def positions(x_BTHW: Tensor, length_N: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Place of each token ``[B, T]`` in its document, after ``length_N`` earlier ones, and the new lengths."""
    batch, tokens = x_BTHW.shape[:2]
    place_T = torch.arange(tokens, device=x_BTHW.device)
    if cu_seqlens is None:
        if length_N is None:
            length_N = place_T.new_zeros(batch)
        return length_N[:, None] + place_T, length_N + tokens
    cu = cu_seqlens.long()
    if length_N is None:
        length_N = cu.new_zeros(cu.shape[0] - 1)
    run_T = torch.searchsorted(cu[1:].contiguous(), place_T, right=True).clamp(max=cu.shape[0] - 2)
    return (place_T + (length_N - cu[:-1])[run_T])[None], length_N + cu.diff()


def token_before(x_BTD: Tensor, state: MixerState | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The token before each one in its document, ``[B, T, D]``, and the last one of every run, ``[N, 1, D]``."""
    taps = F.pad(x_BTD.new_ones(x_BTD.shape[-1], 1), (0, 1))
    return short_conv(x_BTD, taps, state=state.hidden if state else None, cu_seqlens=cu_seqlens)

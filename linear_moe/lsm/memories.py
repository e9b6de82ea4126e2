"""The memories of a mixture beside each other: their projections, their runs in one packed row, their states.

Letters: B rows, T tokens, S = B * T, N runs, E routed memories, F memories with the shared one, M slots, H heads here,
W fused width per head, C channels of one of two parts of it, D hidden, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.kernels import Segment
from linear_moe.kernels.arriving import Arriving
from linear_moe.kernels.grouped_linear import linear_by_group
from linear_moe.lsm.routing import Slots
from linear_moe.lsm.tables import WAISTS, Memory, MixerState, Parameter, Projection

if TYPE_CHECKING:
    from linear_moe.lsm.mixer import MemorySource
    from linear_moe.lsm.mom import MixtureOfMemories


def parameters(own: Sequence[Projection], cfg: MixtureOfMemories.Config) -> list[Parameter]:
    """Weights (and biases) of the projections that every memory has its own of; heads come first, to be sharded.

    Those that are not low-rank share one weight, as in the fused projection.
    """
    heads, count, hidden = cfg.num_heads, cfg.num_memories, cfg.hidden_size
    found = []
    if fused := sum(p.width for p in own if p.rank is None):
        found.append(Parameter("memory_weight", (heads, count, fused, hidden), None))
    for p in own:
        if p.rank is not None:
            found.append(Parameter(f"memory_{p.name}_down", (count, p.rank, hidden), None, per_head=False))
            found.append(Parameter(f"memory_{p.name}_up", (heads, count, p.width, p.rank), None))
        if p.bias:
            found.append(Parameter(f"memory_{p.name}_bias", (heads, count, p.width), torch.nn.init.zeros_))
    return found


def project(
    own: Sequence[Projection], x_MD: Tensor, w: dict[str, Tensor], slots: Slots, num_heads: int
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Sorted slots through the projections of their memory, biased.

    Returns:
        Those that share one weight, ``[M, H, W]`` in the order of ``own``, and the low-rank ones by name.
    """
    ends = slots.ends
    fused = [p for p in own if p.rank is None]
    fused_MHW = None
    if fused:
        fused_MHW = _by_memory(x_MD, w["memory_weight"], ends, num_heads)
        fused_MHW = _biased(fused, fused_MHW, w, slots)
    low_rank = {}
    for p in own:
        if p.rank is not None:
            down = w[f"memory_{p.name}_down"].to(x_MD.dtype)
            waist_MR = WAISTS[p.waist](linear_by_group(x_MD, down, ends))
            up_MHw = _by_memory(waist_MR, w[f"memory_{p.name}_up"], ends, num_heads)
            low_rank[p.name] = _biased([p], up_MHw, w, slots)
    return fused_MHW, low_rank


def _by_memory(x_MI: Tensor, weight_HEwI: Tensor, ends: Tensor, num_heads: int) -> Tensor:
    """``[M, H, w]``: each sorted slot times the weight of its memory."""
    weight_EOI = weight_HEwI.to(x_MI.dtype).transpose(0, 1).flatten(1, 2).contiguous()
    return linear_by_group(x_MI, weight_EOI, ends).unflatten(-1, (num_heads, -1))


def _biased(table: Sequence[Projection], x_MHW: Tensor, w: dict[str, Tensor], slots: Slots) -> Tensor:
    """Projections of each sorted slot with the biases of its memory; dropped ones get none."""
    if not any(p.bias for p in table):
        return x_MHW
    zeros = x_MHW.new_zeros(())
    shape = (x_MHW.shape[1], slots.num_memories)
    biases = [w[f"memory_{p.name}_bias"] if p.bias else zeros.expand(*shape, p.width) for p in table]
    bias_EO = torch.cat(biases, dim=-1).transpose(0, 1).flatten(1).to(x_MHW.dtype)
    # A product: one pass over the slots, as its gradient is. Rows of 16 bytes are what a GPU multiplies best.
    count = -(-slots.num_memories // 8) * 8
    bias_EO = F.pad(bias_EO, (0, 0, 0, count - slots.num_memories))
    which_ME = slots.memory[:, None] == torch.arange(count, device=x_MHW.device)
    return torch.addmm(x_MHW.flatten(1), which_ME.to(x_MHW.dtype), bias_EO).view_as(x_MHW)


def side_by_side(
    widths: dict[str, int],
    x_BTHC: Tensor,
    own_MHC: Tensor | None,
    own: Collection[str],
    slots: Slots,
    *,
    of_tokens: bool,
) -> Tensor:
    """``[1, S + M, H, W]``: projections of all tokens, then those of every sorted slot; one pass, as the gradient's is.

    Args:
        widths: projections by name, in the order of their channels in the result.
        x_BTHC: those of the tokens: all of them, or if ``of_tokens`` is false those that no memory has its own of.
        own_MHC: those that memories have their own of, of every slot.
        own: their names; a slot has the others of its token.
        slots: which.
        of_tokens: whether tokens come first; if not, the result is ``[1, M, H, W]``.
    """
    pieces: list[_Piece] = []
    at = x_at = own_at = 0
    for name, width in widths.items():
        is_own = name in own
        last = pieces[-1] if pieces and pieces[-1].is_own == is_own else None
        if last is not None:
            pieces[-1] = replace(last, width=last.width + width)
        else:
            pieces.append(_Piece(is_own, at, own_at if is_own else x_at, width))
        at += width
        own_at += width if is_own else 0
        x_at += width if of_tokens or not is_own else 0
    out: Tensor = _SideBySide.apply(x_BTHC, own_MHC, slots, tuple(pieces), of_tokens)
    return out


@dataclass(frozen=True)
class _Piece:
    """Channels of slots, and where they come from: the memories' own projections, or the tokens'."""

    is_own: bool
    to: int
    source: int
    width: int

    @property
    def here(self) -> slice:
        return slice(self.to, self.to + self.width)

    @property
    def there(self) -> slice:
        return slice(self.source, self.source + self.width)


class _SideBySide(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTHC: Tensor,
        own_MHC: Tensor | None,
        slots: Slots,
        pieces: tuple[_Piece, ...],
        of_tokens: bool,
    ) -> Tensor:
        batch, tokens, heads = x_BTHC.shape[:3]
        ctx.slots, ctx.pieces, ctx.of_tokens, ctx.shape = slots, pieces, of_tokens, x_BTHC.shape
        first = batch * tokens if of_tokens else 0
        out = x_BTHC.new_empty(1, first + len(slots.order), heads, sum(piece.width for piece in pieces))
        if of_tokens:
            out[0, :first].unflatten(0, (batch, tokens)).copy_(x_BTHC)
        for piece in pieces:
            if piece.is_own:
                assert own_MHC is not None
                rows = own_MHC[..., piece.there]
            else:
                rows = slots.gather(x_BTHC[..., piece.there].flatten(0, 1))
            out[0, first:, :, piece.here] = rows
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        d_out, slots = grads[0][0], ctx.slots
        batch, tokens, heads, channels = ctx.shape
        first = batch * tokens if ctx.of_tokens else 0
        d_x = d_own = None
        if ctx.needs_input_grad[0]:
            # Time first, as the projections are in memory.
            d_x = d_out.new_empty(tokens, batch, heads, channels).transpose(0, 1)
            if ctx.of_tokens:
                d_x.copy_(d_out[:first].unflatten(0, (batch, tokens)))
            for piece in ctx.pieces:
                if not piece.is_own:
                    total = slots.scatter(d_out[first:, :, piece.here]).unflatten(0, (batch, tokens))
                    here = d_x[..., piece.there]
                    here.copy_(here + total if ctx.of_tokens else total)
        if ctx.needs_input_grad[1]:
            d_own = torch.cat([d_out[first:, :, piece.here] for piece in ctx.pieces if piece.is_own], dim=-1)
        return d_x, d_own, None, None, None


@dataclass(frozen=True)
class Rows:
    """The runs of the tokens.

    Attributes:
        run_S: ``[S]`` int64, the run of every token.
        cu_seqlens: ``[N + 1]`` int64, their boundaries in one row of all tokens.
    """

    run_S: Tensor
    cu_seqlens: Tensor

    @classmethod
    def of(cls, batch: int, tokens: int, cu_seqlens: Tensor | None, device: torch.device) -> Rows:
        """Batch rows, or the packed runs of one row."""
        token_S = torch.arange(batch * tokens, device=device)
        if cu_seqlens is None:
            return cls(token_S // tokens, torch.arange(batch + 1, device=device) * tokens)
        cu = cu_seqlens.long()
        run_S = torch.searchsorted(cu[1:].contiguous(), token_S, right=True)
        return cls(run_S.clamp(max=cu.shape[0] - 2), cu)

    @property
    def num_runs(self) -> int:
        """N."""
        return self.cu_seqlens.shape[0] - 1


@dataclass(frozen=True)
class Copies:
    """F memories over N runs: N runs of F memories for the layer, F * N runs of one memory for the inner mixer."""

    count: int
    num_runs: int

    def split(self, state: MixerState) -> MixerState:
        """A state of the layer, ``[N, ..]`` for each memory, as the inner mixer takes it: ``[F * N, ..]``."""
        memory = self._inside(state.memory)
        conv = state.conv
        if conv is not None:
            conv = conv.unflatten(-1, (self.count, -1)).movedim(-2, 0).flatten(0, 1)
        return MixerState(memory, conv)

    def join(self, state: MixerState) -> MixerState:
        """The inverse."""
        memory = tuple(part for x in state.memory for part in x.split(self.num_runs))
        conv = state.conv
        if conv is not None:
            conv = conv.unflatten(0, (self.count, self.num_runs)).movedim(0, -2).flatten(-2)
        return MixerState(memory, conv)

    def through(self, memory_from: MemorySource | None) -> MemorySource | None:
        """The layer's source of memories, as the inner mixer calls it: with segments of F * N runs."""
        if memory_from is None:
            return None

        def source(segments: Sequence[Segment]) -> Memory:
            found = memory_from([self._part(segment, f) for segment in segments for f in range(self.count)])
            return Arriving(len(segments), lambda: self._inside(found))

        return source

    def _inside(self, memory: Memory) -> Memory:
        parts = tuple(memory)
        return tuple(torch.cat(parts[i : i + self.count]) for i in range(0, len(parts), self.count))

    def _part(self, segment: Segment, f: int) -> Segment:
        runs = slice(f * self.num_runs, (f + 1) * self.num_runs)
        fields = (segment.state, segment.log_decay, segment.decay)
        return Segment(*[None if x is None else x[runs] for x in fields])  # type: ignore[arg-type]


def last_inputs(x_1THC: Tensor, reach: int, cu_seqlens: Tensor) -> Segment:
    """What each packed run does to the last inputs of a convolution: shifts them, and puts its own behind.

    Returns:
        ``state`` ``[N, 1, reach, H * C]`` and a dense ``decay`` ``[N, 1, reach, reach]``.
    """
    x_TC = x_1THC[0].flatten(1)
    exact = torch.promote_types(x_TC.dtype, torch.float32)
    cu = cu_seqlens.long()
    start_N1, end_N1 = cu[:-1, None], cu[1:, None]
    slot_R = torch.arange(reach, device=cu.device)
    index_NR = end_N1 - reach + slot_R
    is_own_NR1 = (index_NR >= start_N1)[..., None]
    inputs_NRC = x_TC.index_select(0, index_NR.clamp(min=0).flatten()).unflatten(0, index_NR.shape)
    state = torch.where(is_own_NR1, inputs_NRC, 0).to(exact)
    # Row i of the inputs after a run of n tokens is row i + n of those before it.
    moved_NRR = slot_R[:, None] + (end_N1 - start_N1)[..., None] == slot_R
    return Segment(state[:, None], decay=moved_NRR[:, None].to(exact))

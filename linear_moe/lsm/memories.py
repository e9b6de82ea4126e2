"""The memories of a mixture beside each other: their projections, their runs in one packed row, their states.

Letters: S tokens of all rows, N runs, E routed memories, F memories with the shared one, M slots, H heads here, C
convolution channels, W width of the convolution, D hidden, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
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
) -> dict[str, Tensor]:
    """Sorted slots through the projections of their memory: ``[M, D]`` to ``[M, H, width]`` by name."""
    ends = slots.ends
    fused = [p for p in own if p.rank is None]
    found: dict[str, Tensor] = {}
    if fused:
        out_MHW = _by_memory(x_MD, w["memory_weight"], ends, num_heads)
        parts = out_MHW.split([p.width for p in fused], dim=-1)
        found = dict(zip([p.name for p in fused], parts, strict=True))
    for p in own:
        if p.rank is not None:
            down = w[f"memory_{p.name}_down"].to(x_MD.dtype)
            waist_MR = WAISTS[p.waist](linear_by_group(x_MD, down, ends))
            found[p.name] = _by_memory(waist_MR, w[f"memory_{p.name}_up"], ends, num_heads)
        if p.bias:
            bias_EHw = w[f"memory_{p.name}_bias"].transpose(0, 1)
            # Dropped slots belong to no memory; any bias will do, since what they hold is not used.
            found[p.name] = found[p.name] + bias_EHw[slots.memory.clamp(max=bias_EHw.shape[0] - 1)]
    return found


def _by_memory(x_MI: Tensor, weight_HEwI: Tensor, ends: Tensor, num_heads: int) -> Tensor:
    """``[M, H, w]``: each sorted slot times the weight of its memory."""
    weight_EOI = weight_HEwI.to(x_MI.dtype).transpose(0, 1).flatten(1, 2).contiguous()
    return linear_by_group(x_MI, weight_EOI, ends).unflatten(-1, (num_heads, -1))


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

"""LASP-2: the memory before each local chunk, from one all-gather of segments.

    S_c = state_{c-1} + decay_{c-1} . (state_{c-2} + decay_{c-2} . (...))

Every rank sends what its chunks do to any memory, receives everyone's, and folds the prefix it needs. The message does
not depend on the sequence length; the backward pass is one reduce-scatter of the same size. In Megatron's zigzag layout
a rank sends two segments per sequence (arXiv:2502.07563 has one, for contiguous ranks). Nobody waits for the all-gather
before the memory is looked at: operations first start what needs none (:mod:`linear_moe.kernels.arriving`).

Letters: see :mod:`linear_moe.parallel.layout`; H heads here, K key dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from linear_moe.kernels.arriving import Arriving
from linear_moe.kernels.segment import Segment
from linear_moe.parallel.collectives import start_all_gather
from linear_moe.parallel.layout import SequenceLayout


def initial_states(segments: Sequence[Segment], layout: SequenceLayout, group: dist.ProcessGroup) -> Arriving:
    """The memory each local run starts from, on its way: the all-gather is started.

    Args:
        segments: one per matrix memory of the mixer, each over this rank's runs (``layout.runs``), from empty.
        layout: the layout of the runs, ``cp_size > 1``.
        group: the context-parallel group.

    Returns:
        For each segment ``[runs, H, K, V]``, as ``state`` of the mixer's scan.
    """
    chunks = [_chunk_segment(segment, layout) for segment in segments]
    parts = [part for chunk in chunks for part in _parts(chunk)]
    gathering = start_all_gather(torch.cat([part.flatten(1) for part in parts], dim=1), group)

    def arrive() -> list[Tensor]:
        gathered_RBJ = gathering.wait().unflatten(1, (layout.batch, layout.chunks_per_rank))
        natural_CB = layout.natural_order(gathered_RBJ)
        pieces = iter(natural_CB.split([part[0].numel() for part in parts], dim=2))
        states = []
        for chunk in chunks:
            unpacked = [next(pieces).unflatten(2, part.shape[1:]) for part in _parts(chunk)]
            prefix_BJ = _fold(_by_chunk(chunk, unpacked), layout.local_chunks)
            # The run that continues a document from the chunk before gets its prefix, and the others nothing.
            states.append(layout.first_runs(prefix_BJ) if layout.is_packed else prefix_BJ.flatten(0, 1))
        return states

    return Arriving(len(segments), arrive)


def _parts(segment: Segment) -> list[Tensor]:
    decay = segment.decay if segment.decay is not None else segment.log_decay
    return [segment.state] if decay is None else [segment.state, decay.to(segment.state.dtype)]


def _chunk_segment(segment: Segment, layout: SequenceLayout) -> Segment:
    """One segment per (sequence, local chunk): that of its last document, which alone reaches the next chunk."""
    if not layout.is_packed:
        return segment
    chunks = layout.batch * layout.chunks_per_rank
    last = layout.last_document_BJ.flatten()
    rows = torch.arange(chunks, device=last.device)

    def pick(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.unflatten(0, (chunks, -1))[rows, last]

    state = pick(segment.state)
    assert state is not None
    starts_here = layout.document_start(layout.last_document_BJ) >= layout.starts_BJ
    chunk = Segment(state, log_decay=pick(segment.log_decay), decay=pick(segment.decay))
    return chunk.forgetting(starts_here.flatten())


def _by_chunk(like: Segment, parts_CB: list[Tensor]) -> list[Segment]:
    """What each chunk of the sequences does to a memory, in sequence order, from :func:`_parts` of all of them."""
    state_CB, *decay_CB = parts_CB
    if not decay_CB:
        return [Segment(state) for state in state_CB]
    name = "log_decay" if like.decay is None else "decay"
    return [Segment(state, **{name: decay}) for state, decay in zip(state_CB, *decay_CB, strict=True)]


def _fold(segments_C: Sequence[Segment], local_chunks: tuple[int, ...]) -> Tensor:
    """The memory before each local chunk, ``[B, J, H, K, V]``, folding in sequence order on every rank alike."""
    before_C = [torch.zeros_like(segments_C[0].state)]
    for segment in segments_C[: max(local_chunks)]:
        before_C.append(segment.carry(before_C[-1]))
    return torch.stack([before_C[c] for c in local_chunks], dim=1)

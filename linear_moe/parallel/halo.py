"""The few tokens before each local chunk, for short convolutions and token shifts.

One small all-gather of every chunk's last tokens; the left neighbour of a chunk is looked up in sequence order, so
zigzag needs no special case. Tokens of an earlier document are zero, as at the start of a sequence.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from linear_moe.parallel.collectives import all_gather
from linear_moe.parallel.layout import SequenceLayout


def tokens_before(x_BT: Tensor, count: int, layout: SequenceLayout, group: dist.ProcessGroup) -> Tensor:
    """The ``count`` tokens before the first token of every local run.

    Args:
        x_BT: ``[B, T, ...]`` local tokens in zigzag order.
        count: how many, at most a chunk.
        layout: the layout of ``x_BT``, ``cp_size > 1``.
        group: the context-parallel group.

    Returns:
        ``[runs, count, ...]``, zero where the document does not reach that far back.
    """
    if count > layout.chunk_length:
        raise ValueError(
            f"a convolution that looks {count} tokens back needs chunks of at least {count} tokens, "
            f"got {layout.chunk_length}\n"
            f"  why: context parallelism fetches them from the left neighbour chunk only\n"
            f"  try: a longer sequence, or a context parallel size below {layout.cp_size}"
        )
    chunks_BJ = x_BT.unflatten(1, (layout.chunks_per_rank, layout.chunk_length))
    tails_BJ = chunks_BJ[:, :, -count:].contiguous()
    gathered_RBJ = all_gather(tails_BJ.flatten(0, 1), group).unflatten(1, tails_BJ.shape[:2])
    natural_CB = layout.natural_order(gathered_RBJ)
    empty = torch.zeros_like(natural_CB[0])
    before_BJ = torch.stack([natural_CB[c - 1] if c else empty for c in layout.local_chunks], dim=1)
    if not layout.is_packed:
        return before_BJ.flatten(0, 1)
    positions_BJw = layout.starts_BJ[..., None] + torch.arange(-count, 0, device=x_BT.device)
    start_BJ = layout.document_start(layout.first_document_BJ)
    inside = positions_BJw >= start_BJ[..., None]
    before_BJ = before_BJ * inside.view(*inside.shape, *(1,) * (before_BJ.ndim - 3))
    return layout.first_runs(before_BJ)


def lengths_before(layout: SequenceLayout, device: torch.device) -> Tensor:
    """How many tokens of its document come before each local run, ``[runs]`` int64; ``cp_size > 1``."""
    if not layout.is_packed:
        return layout.starts_of_chunks(device).repeat(layout.batch)
    inside_BJ = layout.starts_BJ - layout.document_start(layout.first_document_BJ)
    return layout.first_runs(inside_BJ)

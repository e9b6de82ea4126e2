"""Which tokens of each sequence a context-parallel rank holds, and where documents begin in them.

Megatron cuts a sequence of S tokens into 2 * R equal chunks and gives rank r the chunks r and 2R - 1 - r (zigzag), so
that causal attention is balanced (``megatron.core.utils.get_batch_on_this_cp_rank``). Two neighbouring local chunks
are therefore *not* neighbours in the sequence: everything that carries a memory works on chunks, never on ranks.

A **run** is a stretch of local tokens that is contiguous in its sequence and, when documents are packed, inside one
document. Mixers see runs only: as batch rows ``[B * J, L]`` without documents, as one packed row with ``cu_seqlens``
with them (documents that own no local token are empty runs, so shapes never depend on data).

Letters: B batch, R ranks of the group, J chunks on this rank (1 without context parallelism, else 2), C = J * R chunks
of a sequence, L tokens of a chunk, T = J * L local tokens, S tokens of a sequence, N documents of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceLayout:
    """The share of ``batch`` sequences of ``length`` tokens that rank ``cp_rank`` of ``cp_size`` holds.

    Attributes:
        batch: sequences.
        length: tokens of a whole sequence, divisible by ``2 * cp_size`` when ``cp_size > 1``.
        cp_size: ranks that share a sequence.
        cp_rank: this rank.
        cu_seqlens: ``[B, N + 1]`` int, document boundaries in each whole sequence: starts at 0, never falls, ends at
            ``length`` (repeated as padding). ``None``: one document per sequence.
    """

    batch: int
    length: int
    cp_size: int = 1
    cp_rank: int = 0
    cu_seqlens: Tensor | None = None

    def __post_init__(self) -> None:
        if self.cp_size > 1 and self.length % (2 * self.cp_size):
            multiple = 2 * self.cp_size
            raise ValueError(
                f"sequence length {self.length} cannot be cut into {multiple} equal chunks\n"
                f"  why: context parallel size {self.cp_size} gives every rank two chunks (zigzag)\n"
                f"  try: a sequence length that is a multiple of {multiple}"
            )

    @property
    def chunks_per_rank(self) -> int:
        """J: 2 in zigzag order, 1 without context parallelism."""
        return 1 if self.cp_size == 1 else 2

    @property
    def num_chunks(self) -> int:
        """Chunks of a whole sequence."""
        return self.chunks_per_rank * self.cp_size

    @property
    def chunk_length(self) -> int:
        """L: tokens of one chunk."""
        return self.length // self.num_chunks

    @property
    def local_chunks(self) -> tuple[int, ...]:
        """Natural index of each chunk on this rank, in local order."""
        if self.cp_size == 1:
            return (0,)
        return (self.cp_rank, self.num_chunks - 1 - self.cp_rank)

    def starts_of_chunks(self, device: torch.device) -> Tensor:
        """Position in its sequence of each local chunk's first token, ``[J]`` int64."""
        first, last = self.local_chunks[0], self.local_chunks[-1]
        # Made where they are read: for a copy of numbers from the host a GPU is waited for.
        chunk_J = first + (last - first) * torch.arange(self.chunks_per_rank, device=device)
        return chunk_J * self.chunk_length

    @property
    def is_packed(self) -> bool:
        """Whether sequences hold several documents."""
        return self.cu_seqlens is not None

    # ---- tokens -> runs -> tokens ----

    def runs(self, x_BT: Tensor) -> Tensor:
        """``[B, T, ...]`` local tokens as rows of runs: ``[B * J, L, ...]``, or ``[1, B * T, ...]`` when packed."""
        rest = x_BT.shape[2:]
        if self.is_packed:
            return x_BT.reshape(1, x_BT.shape[0] * x_BT.shape[1], *rest)  # of no channels, too
        if self.chunks_per_rank == 1:
            return x_BT
        return x_BT.reshape(self.batch * self.chunks_per_rank, self.chunk_length, *rest)

    def tokens(self, x_runs: Tensor) -> Tensor:
        """The inverse of :meth:`runs`."""
        return x_runs.reshape(self.batch, self.chunks_per_rank * self.chunk_length, *x_runs.shape[2:])

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's chunks of a whole-sequence tensor, in local order."""
        chunks = x.unflatten(dim, (self.num_chunks, self.chunk_length))
        return torch.cat([chunks.select(dim, c) for c in self.local_chunks], dim=dim)

    def natural_order(self, gathered_RBJ: Tensor) -> Tensor:
        """Chunks of all ranks ``[R, B, J, ...]`` in sequence order ``[C, B, ...]``."""
        first = gathered_RBJ[:, :, 0]
        if self.chunks_per_rank == 1:
            return first
        return torch.cat([first, gathered_RBJ[:, :, 1].flip(0)])

    # ---- documents ----

    @cached_property
    def run_cu_seqlens(self) -> Tensor | None:
        """``[B * J * N + 1]`` int32 boundaries of the runs in the packed local row; ``None`` when not packed."""
        if self.cu_seqlens is None:
            return None
        lengths_BJN = self._clipped_BJN1.diff(dim=-1)
        return torch.nn.functional.pad(lengths_BJN.flatten().cumsum(0), (1, 0)).int()

    @cached_property
    def starts_BJ(self) -> Tensor:
        """Position in its sequence of each local chunk's first token, ``[B, J]``; packed layouts only."""
        assert self.cu_seqlens is not None
        return self.starts_of_chunks(self.cu_seqlens.device).expand(self.batch, -1)

    @cached_property
    def _clipped_BJN1(self) -> Tensor:
        """Document boundaries clipped to each local chunk, relative to its start."""
        assert self.cu_seqlens is not None
        relative = self.cu_seqlens[:, None].long() - self.starts_BJ[..., None]
        return relative.clamp(0, self.chunk_length)

    def document_at(self, position_BJ: Tensor) -> Tensor:
        """Index ``[B, J]`` of the document that holds the token at ``position_BJ`` of each sequence."""
        assert self.cu_seqlens is not None
        return (self.cu_seqlens[:, None].long() <= position_BJ[..., None]).sum(-1) - 1

    @cached_property
    def first_document_BJ(self) -> Tensor:
        """The document of each local chunk's first token."""
        return self.document_at(self.starts_BJ)

    @cached_property
    def last_document_BJ(self) -> Tensor:
        """The document of each local chunk's last token."""
        return self.document_at(self.starts_BJ + self.chunk_length - 1)

    def document_start(self, document_BJ: Tensor) -> Tensor:
        """Position ``[B, J]`` of the first token of each given document."""
        assert self.cu_seqlens is not None
        return self.cu_seqlens.long().gather(1, document_BJ)

    def first_runs(self, x_BJ: Tensor) -> Tensor:
        """``[B, J, ...]`` to ``[runs, ...]``: zero but for each chunk's first run, if its document began earlier."""
        assert self.cu_seqlens is not None
        continues_BJ = self.document_start(self.first_document_BJ) < self.starts_BJ
        num_documents = self.cu_seqlens.shape[1] - 1
        is_first_BJN = torch.nn.functional.one_hot(self.first_document_BJ, num_documents).bool()
        chosen_BJN = is_first_BJN & continues_BJ[..., None]
        ones = (1,) * (x_BJ.ndim - 2)
        return (x_BJ[:, :, None] * chosen_BJN.view(*chosen_BJN.shape, *ones)).flatten(0, 2)

    @cached_property
    def document_ids_BS(self) -> Tensor | None:
        """The document of every token of the whole sequences, ``[B, S]``; ``None`` when not packed."""
        if self.cu_seqlens is None:
            return None
        positions_S = torch.arange(self.length, device=self.cu_seqlens.device)
        return torch.searchsorted(
            self.cu_seqlens.long().contiguous(), positions_S.expand(self.batch, -1).contiguous(), right=True
        )

"""What the launches over chunks share, of the delta rule and of a diagonal plus low-rank memory: room, sizes, pieces.

Long rows of few heads are cut in pieces, which the scans treat as documents: first what each does to any memory, then
the memories before them, one by one, then all pieces at once.

Letters: B batch, T tokens, H heads, K key dim, V value dim, N documents, S chunks of all documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from linear_moe.kernels.triton import configs, delta_configs
from linear_moe.kernels.triton.layout import Layout, lay_out
from linear_moe.kernels.triton.sizes import cdiv

Scan = Callable[[Tensor | None, Tensor | None, Tensor | None, Tensor | None], Tensor]
"""From values (or their gradients), the memory to start from, and room for what it finds; any may be ``None``."""


@dataclass(frozen=True)
class ChunkLaunch:
    """What every call knows of its chunks."""

    layout: Layout
    """Its segments are chunks."""
    num_heads: int
    num_keys: int
    num_values: int
    dtype: torch.dtype
    device: torch.device
    scale: float
    chunk: int
    pieces: int
    """Of a row, for the scans."""

    def in_pieces(
        self, scan: Scan, v: Tensor, initial: Tensor | None, actions: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The memory before every chunk ``[S, H, K, V]``, values ``[B, T, H, V]``, the final memory, and M of pieces.

        ``actions`` of the pieces, where there are several.
        """
        states, values = self.new_states(), self.new_values()
        if actions is None:
            return states, values, scan(v, initial, states, values), None
        maps, written = actions
        before = carried(maps, written, initial).flatten(0, 1)
        final = scan(v, before, states, values).view_as(written)[:, -1]
        return states, values, final.contiguous(), maps

    def back_in_pieces(
        self, scan: Scan, do: Tensor, d_final: Tensor | None, maps: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of the memory after every chunk, of the values, and of the initial memory."""
        d_states, d_values = self.new_states(), self.new_values()
        if maps is None:
            return d_states, d_values, scan(do, d_final, d_states, d_values)
        shape = self.layout.num_rows, self.pieces, self.num_heads, self.num_keys, self.num_values
        read = scan(do, None, None, None).view(shape)
        after = carried(maps.mT.flip(1), read.flip(1), d_final).flip(1).flatten(0, 1).contiguous()
        d_initial = scan(do, after, d_states, d_values).view(shape)[:, 0]
        return d_states, d_values, d_initial.contiguous()

    def of_pieces(self, scan: Scan, v: Tensor) -> tuple[Tensor, Tensor]:
        """What every piece of every document does to a memory: M ``[N, pieces, H, K, K]`` and N ``[.., V]``."""
        shape = self.layout.num_documents, self.pieces, self.num_heads, self.num_keys
        maps = scan(None, self.identity().flatten(0, 1).contiguous(), None, None)
        written = scan(v, None, None, None)
        return maps.view(*shape, self.num_keys), written.view(*shape, self.num_values)

    def identity(self) -> Tensor:
        """``[N, pieces, H, K, K]``, expanded."""
        identity = torch.eye(self.num_keys, dtype=torch.float32, device=self.device)
        return identity.expand(self.layout.num_documents, self.pieces, self.num_heads, -1, -1)

    def new_states(self) -> Tensor:
        """``[S, H, K, V]``, room for a memory of every chunk."""
        return self._empty(self.layout.num_segments, self.num_heads, self.num_keys, self.num_values)

    def new_values(self) -> Tensor:
        """``[B, T, H, V]``."""
        return self._empty(*self._tokens(), self.num_values)

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=self.dtype if dtype is None else dtype, device=self.device)

    def _tokens(self) -> tuple[int, int, int]:
        return self.layout.num_rows, self.layout.num_tokens, self.num_heads

    def _places(self) -> int:
        return self.layout.num_segments * self.num_heads

    def _sharing(self, k: Tensor) -> int:
        return self.num_heads // k.shape[2]

    def _levels(self) -> int:
        return self.chunk.bit_length() - 1


def plan_chunks(
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    blocks: Callable[[int, int, torch.dtype], delta_configs.Cut],
) -> ChunkLaunch:
    """Chunks of all documents, and pieces for scans with these ``blocks``."""
    rows, num_tokens, num_heads, num_values = v.shape
    num_keys = k.shape[-1]
    chunk = configs.chunk_size(v.dtype, num_keys)
    layout = lay_out(rows, num_tokens, chunk, cu_seqlens, like=v)
    per_row = num_heads * cdiv(num_values, blocks(num_keys, num_values, v.dtype).values)
    rows, all_tokens = configs.deciding(rows, num_tokens)
    all_chunks = 1 if layout.is_packed else cdiv(all_tokens, chunk)
    pieces = delta_configs.pieces(rows * per_row, all_chunks, configs.num_processors(v.device))
    if pieces > 1 and all_tokens != num_tokens:
        pieces = layout.segments_per_row
    return ChunkLaunch(layout, num_heads, num_keys, num_values, v.dtype, v.device, scale, chunk, pieces)


def carried(maps: Tensor, written: Tensor | None, initial: Tensor | None) -> Tensor:
    """The memory before every piece ``[B, pieces, H, K, V]``, from M ``[B, pieces, H, K, K]`` and N of each.

    ``None`` for all N or for the initial memory is zeros, not for both.
    """
    if initial is None:
        assert written is not None
        initial = torch.zeros_like(written[:, 0])
    before = [initial]
    with torch.autocast(maps.device.type, enabled=False):
        for piece in range(maps.shape[1] - 1):
            memory = maps[:, piece] @ before[-1]
            before.append(memory if written is None else memory + written[:, piece])
    return torch.stack(before, 1)

"""Tokens cut into chunks of equal length, for whole rows and for packed documents, and the states between chunks.

A chunked kernel sees ``[L, B, H, C, ...]`` whatever the batch is made of; a chunk never spans two documents. Slots
without a token hold zeros, which write nothing, erase nothing and (a log decay of 0) forget nothing. Packed
documents need no host synchronisation: the number of chunks is bounded by T // C + N + 1, a static figure, and
the last chunk is always free, so tokens after the last document read zeros from it.

Letters: L chunks in a row, C tokens in a chunk, B batch (1 when packed), T tokens, H heads, K key dim, V value dim,
N documents (B when not packed).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linear_moe.kernels.once import once_differentiable


@dataclass(frozen=True)
class RowChunks:
    """Every row of the batch is one document."""

    num_documents: int
    num_tokens: int
    chunk_size: int

    def split(self, x_BTH: Tensor, dtype: torch.dtype) -> Tensor:
        """``[B, T, H, ...]`` to a contiguous ``[L, B, H, C, ...]``, zero where there is no token. No autograd."""
        batch, num_tokens, heads, *rest = x_BTH.shape
        size, full = self.chunk_size, num_tokens // self.chunk_size
        num_chunks = -(-num_tokens // size)
        allocate = torch.empty if num_chunks == full else torch.zeros
        out = allocate((num_chunks, batch, heads, size, *rest), dtype=dtype, device=x_BTH.device)
        whole = x_BTH[:, : full * size].unflatten(1, (full, size)) if full else None
        if whole is not None:
            out[:full].copy_(whole.movedim(0, 1).transpose(2, 3))
        if num_chunks > full:
            out[full, :, :, : num_tokens - full * size].copy_(x_BTH[:, full * size :].transpose(1, 2))
        return out

    def join(self, x_LBHC: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of :meth:`split`, and its adjoint. No autograd."""
        _, batch, heads, size, *rest = x_LBHC.shape
        full = self.num_tokens // size
        out = torch.empty((batch, self.num_tokens, heads, *rest), dtype=dtype, device=x_LBHC.device)
        if full:
            whole = out[:, : full * size].unflatten(1, (full, size))
            whole.copy_(x_LBHC[:full].transpose(2, 3).movedim(0, 1))
        if self.num_tokens > full * size:
            out[:, full * size :].copy_(x_LBHC[full, :, :, : self.num_tokens - full * size].transpose(1, 2))
        return out

    def thread(self, decay: Tensor, write: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decays and writes that lead from the state before each chunk to that before the next, and the first state."""
        return decay[:-1], write[:-1], state

    def last(self, x_LB: Tensor) -> Tensor:
        """The last chunk of each document: ``[L, B, ...]`` to ``[N, ...]``."""
        return x_LB[-1]

    def keep_if_empty(self, final: Tensor, state: Tensor) -> Tensor:
        """``state`` for documents without tokens, ``final`` for the others."""
        return final


@dataclass(frozen=True)
class PackedChunks:
    """One row that holds N documents end to end; some may be empty."""

    chunk_size: int
    token_of_slot: Tensor
    """``[L * C]``; any valid index where ``is_slot_used`` is false."""
    is_slot_used: Tensor
    """``[L * C]`` bool."""
    slot_of_token: Tensor
    """``[T]``; a free slot for tokens after the last document."""
    document: Tensor
    """``[L]``, the document a chunk belongs to; any valid index for free chunks."""
    is_first: Tensor
    """``[L]`` bool: the chunk opens a document, or is free."""
    last_chunk: Tensor
    """``[N]``; any valid index for empty documents."""
    is_empty: Tensor
    """``[N]`` bool."""

    @property
    def num_documents(self) -> int:
        """N."""
        return self.last_chunk.shape[0]

    @classmethod
    def plan(cls, cu_seqlens: Tensor, num_tokens: int, chunk_size: int) -> PackedChunks:
        """Lay documents out in chunks, on the device and without waiting for it."""
        cu = cu_seqlens.long()
        num_documents = cu.shape[0] - 1
        num_chunks = min(num_tokens // chunk_size + num_documents, num_tokens) + 1
        lengths_N = cu.diff()
        chunk_ends_N = ((lengths_N + chunk_size - 1) // chunk_size).cumsum(0)
        chunk_starts_N = torch.cat([chunk_ends_N.new_zeros(1), chunk_ends_N[:-1]])

        chunk_L = torch.arange(num_chunks, device=cu.device)
        document_L = torch.searchsorted(chunk_ends_N, chunk_L, right=True).clamp(max=num_documents - 1)
        offset_L = chunk_L - chunk_starts_N[document_L]
        is_used_L = chunk_L < chunk_ends_N[-1]
        slot_C = torch.arange(chunk_size, device=cu.device)
        token_LC = (cu[document_L] + offset_L * chunk_size)[:, None] + slot_C
        is_used_LC = is_used_L[:, None] & (token_LC < cu[document_L + 1][:, None])

        token_T = torch.arange(num_tokens, device=cu.device)
        document_T = torch.searchsorted(cu[1:], token_T, right=True).clamp(max=num_documents - 1)
        slot_T = chunk_starts_N[document_T] * chunk_size + token_T - cu[document_T]
        return cls(
            chunk_size,
            token_of_slot=token_LC.clamp(0, num_tokens - 1).flatten(),
            is_slot_used=is_used_LC.flatten(),
            slot_of_token=torch.where(token_T < cu[-1], slot_T, (num_chunks - 1) * chunk_size),
            document=document_L,
            is_first=offset_L == 0,
            last_chunk=(chunk_ends_N - 1).clamp(min=0),
            is_empty=lengths_N == 0,
        )

    def split(self, x_BTH: Tensor, dtype: torch.dtype) -> Tensor:
        """``[1, T, H, ...]`` to a contiguous ``[L, 1, H, C, ...]``, zero where there is no token. No autograd."""
        x_SH = x_BTH[0].index_select(0, self.token_of_slot).to(dtype)
        x_SH.masked_fill_(_append_dims(~self.is_slot_used, x_SH.ndim), 0.0)
        return x_SH.unflatten(0, (-1, self.chunk_size)).transpose(1, 2).contiguous().unsqueeze(1)

    def join(self, x_LBHC: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of :meth:`split`, and its adjoint. No autograd."""
        x_SH = x_LBHC[:, 0].transpose(1, 2).flatten(0, 1)
        return x_SH.index_select(0, self.slot_of_token).to(dtype).unsqueeze(0)

    def thread(self, decay: Tensor, write: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As for rows; where the next chunk opens a document, its initial state replaces what was there."""
        before = state.index_select(0, self.document).unsqueeze(1)
        opens = _append_dims(self.is_first[1:], write.ndim)
        return decay[:-1].masked_fill(opens, 0.0), torch.where(opens, before[1:], write[:-1]), before[0]

    def last(self, x_LB: Tensor) -> Tensor:
        """The last chunk of each document: ``[L, 1, ...]`` to ``[N, ...]``."""
        return x_LB[:, 0].index_select(0, self.last_chunk)

    def keep_if_empty(self, final: Tensor, state: Tensor) -> Tensor:
        """``state`` for documents without tokens, ``final`` for the others."""
        return torch.where(_append_dims(self.is_empty, final.ndim), state, final)


Chunks = RowChunks | PackedChunks


def preferred_chunk_size(device: torch.device, num_keys: int) -> int:
    """Scores cost T * C, states between chunks T / C * K * V: on a CPU small heads want short chunks (measured)."""
    if device.type != "cpu":
        return 64
    return 16 if num_keys <= 16 else 32 if num_keys <= 64 else 64


def cut(k: Tensor, cu_seqlens: Tensor | None) -> Chunks:
    """Lay out the tokens of ``k``; runs shorter than a chunk get a smaller one (decoding has one token)."""
    num_tokens, num_keys = k.shape[1], k.shape[-1]
    chunk_size = min(preferred_chunk_size(k.device, num_keys), 1 << (num_tokens - 1).bit_length())
    if cu_seqlens is None:
        return RowChunks(k.shape[0], num_tokens, chunk_size)
    return PackedChunks.plan(cu_seqlens, num_tokens, chunk_size)


def carry_states(
    chunks: Chunks, decay: Tensor, write: Tensor, state: Tensor, *, dense: bool = False
) -> tuple[Tensor, Tensor]:
    """The memory before every chunk and after every document, where a chunk does ``S -> decay . S + write``.

    Args:
        chunks: the layout.
        decay: ``[L, B, H, K, K]`` when ``dense``, else ``[L, B, H, K | 1, V | 1]`` (leading dims may be 1, L not).
        write: ``[L, B, H, K, V]``.
        state: ``[N, H, K, V]``, before the first token of each document.
        dense: whether ``decay`` is a matrix or one number for each row or column of the memory.

    Returns:
        ``[L, B, H, K, V]`` and ``[N, H, K, V]``.
    """
    before = _Scan.apply(*chunks.thread(decay, write, state), dense)
    last_decay, last_before = chunks.last(decay), chunks.last(before)
    carried = last_decay @ last_before if dense else last_decay * last_before
    return before, chunks.keep_if_empty(carried + chunks.last(write), state)


class _Scan(torch.autograd.Function):
    """``S_0 = initial, S_{l+1} = decay_l . S_l + write_l``: the only loop over chunks, one operation a step."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, write: Tensor, initial: Tensor, dense: bool) -> Tensor:
        states = initial.new_empty(write.shape[0] + 1, *initial.shape)
        states[0] = initial
        _sweep(decay.unbind(), write.unbind(), states.unbind(), dense)
        ctx.save_for_backward(decay, states)
        ctx.dense = dense
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        decay, states = ctx.saved_tensors
        total = torch.empty_like(states)
        total[-1] = grad[-1]
        transposed = decay.mT if ctx.dense else decay
        _sweep(transposed.unbind()[::-1], grad.unbind()[-2::-1], total.unbind()[::-1], ctx.dense)
        grad_decay: Tensor | None = None
        if ctx.needs_input_grad[0]:
            after, before = total[1:], states[:-1]
            grad_decay = after @ before.mT if ctx.dense else (after * before).sum_to_size(decay.shape)
        return grad_decay, total[1:], total[0], None


def _sweep(
    decays: tuple[Tensor, ...], writes: tuple[Tensor, ...], states: tuple[Tensor, ...], dense: bool
) -> None:
    """Fill ``states[1:]`` from ``states[0]``."""
    for step, (decay, write) in enumerate(zip(decays, writes)):
        before, after = states[step], states[step + 1]
        if dense:
            parts = (x.flatten(0, 1) for x in (write, decay, before))
            torch.baddbmm(*parts, out=after.flatten(0, 1))
        else:
            torch.addcmul(write, decay, before, out=after)


def _append_dims(x: Tensor, ndim: int) -> Tensor:
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))

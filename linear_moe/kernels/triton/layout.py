# mypy: allow-untyped-defs
"""Which run of tokens a program owns: segments of documents, of whole rows or packed.

A segment never spans two documents. Packed documents are cut on the device, into at most T // size + N + 1 segments,
and nothing waits for it: the plan holds (first token, tokens, document) for each segment;
tokens after the last document form document N, which has no state; unused segments have no tokens.

Letters: S segments, N documents, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.triton.sizes import cdiv


@dataclass(frozen=True)
class Layout:
    """How many segments there are, and where the kernels find them."""

    num_rows: int
    num_tokens: int
    """Of one row."""
    num_documents: int
    segment_size: int
    num_segments: int
    segments_per_row: int
    plan: Tensor
    """``[S, 3]`` int32 for packed documents."""
    first_segment: Tensor
    """``[N + 1]`` int32 for packed documents."""
    is_packed: bool

    @property
    def is_split(self) -> bool:
        """Whether states travel between segments through memory."""
        return self.is_packed or self.segments_per_row > 1

    @property
    def num_all(self) -> int:
        """Tokens of all rows."""
        return self.num_rows * self.num_tokens

    def num_slots(self, size: int) -> int:
        """Room for one entry for each ``size`` tokens of every segment; the place is ``chunk_slot`` of a kernel."""
        return self.num_all // size + self.num_segments


def lay_out(rows: int, num_tokens: int, segment_size: int, cu_seqlens: Tensor | None, like: Tensor) -> Layout:
    """Cut ``rows`` rows of ``num_tokens`` tokens, or the documents of one row, into segments."""
    if cu_seqlens is None:
        per_row = cdiv(num_tokens, segment_size)
        return Layout(rows, num_tokens, rows, segment_size, rows * per_row, per_row, like, like, False)
    num_documents = cu_seqlens.shape[0] - 1
    num_segments = min(num_tokens // segment_size + num_documents + 1, num_tokens)
    plan = torch.zeros(num_segments, 3, dtype=torch.int32, device=cu_seqlens.device)
    first_segment = torch.empty(num_documents + 1, dtype=torch.int32, device=cu_seqlens.device)
    layout_plan_kernel[(num_documents + 1,)](
        cu_seqlens.contiguous(),
        plan,
        first_segment,
        num_tokens,
        num_documents,
        num_segments,
        segment_size,
        BLOCK=256,
        num_warps=1,
    )
    return Layout(1, num_tokens, num_documents, segment_size, num_segments, 1, plan, first_segment, True)


def rows_together(x: Tensor) -> Tensor:
    """The kernels take any strides but that of the last dim."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def in_order_of(like: Tensor, x_BTHD: Tensor) -> Tensor:
    """Room for a tensor like ``x``, with tokens outside of rows where ``like`` has them so; heads lie together.

    What follows a gate, a slice of a projection, goes into another projection: time first, it is not copied for it.
    """
    if like.stride(0) >= like.stride(1):
        return torch.empty_like(x_BTHD, memory_format=torch.contiguous_format)
    return torch.empty_like(x_BTHD.transpose(0, 1), memory_format=torch.contiguous_format).transpose(0, 1)


def runs_of_heads(x: Tensor, run: int) -> tuple[int, int]:
    """The grid of programs that own one head of ``run`` tokens each of ``[B, T, H, K]``: (B * runs, H)."""
    return x.shape[0] * cdiv(x.shape[1], run), x.shape[2]


def of_groups(grad: Tensor, x_BTGK: Tensor) -> Tensor:
    """Sum over the heads that share one of ``x``: in float32, rounded once."""
    if grad.shape[2] == x_BTGK.shape[2]:
        return grad
    return grad.unflatten(2, (x_BTGK.shape[2], -1)).sum(3)


@triton.jit
def chunk_slot(token, segment, chunk, SIZE: tl.constexpr):
    """Place of a chunk of ``SIZE`` tokens among those of all segments; ``token`` is where the segment starts.

    Unique, since segments are in the order of their tokens, and below ``Layout.num_slots(SIZE)``.
    """
    return token // SIZE + segment + chunk


@triton.jit
def segment_of(
    plan, segment, num_tokens, segment_size, segments_per_row, num_documents, IS_PACKED: tl.constexpr
):  # fmt: skip
    """Row, first token in it, tokens, and how many of them belong to a document: all or none."""
    if IS_PACKED:
        row = segment * 0
        start = tl.load(plan + segment * 3)
        length = tl.load(plan + segment * 3 + 1)
        document = tl.load(plan + segment * 3 + 2)
        readable = tl.where(document < num_documents, length, 0)
    else:
        row = segment // segments_per_row
        place = segment % segments_per_row
        start = place * segment_size
        length = tl.minimum(segment_size, num_tokens - start)
        readable = length
    return row, start, length, readable


@triton.jit(do_not_specialize=["num_tokens", "num_documents", "num_segments", "segment_size"])
def layout_plan_kernel(
    cu_seqlens,  # [N + 1]
    plan,  # [S, 3] int32, zeros
    first_segment,  # [N + 1] int32: of each document, and of the tokens after the last one
    num_tokens,
    num_documents,
    num_segments,
    segment_size,
    BLOCK: tl.constexpr,
):
    """Program n cuts document n; program N the tokens after the last document.

    Offsets that are no documents give nonsense, but no access outside of any tensor.
    """
    n = tl.program_id(0)
    first = n * 0
    for m in range(0, tl.cdiv(n, BLOCK)):
        document = m * BLOCK + tl.arange(0, BLOCK)
        ends = tl.load(cu_seqlens + document + 1, mask=document < n, other=0)
        starts = tl.load(cu_seqlens + document, mask=document < n, other=0)
        first += tl.sum(((ends - starts + segment_size - 1) // segment_size).to(tl.int32))
    first = tl.minimum(tl.maximum(first, 0), num_segments)
    tl.store(first_segment + n, first)

    start = tl.maximum(tl.load(cu_seqlens + n), 0).to(tl.int32)
    end = tl.load(cu_seqlens + n + 1, mask=n < num_documents, other=0).to(tl.int32)
    end = tl.minimum(tl.where(n < num_documents, end, num_tokens), num_tokens)
    count = tl.cdiv(end - start, segment_size)
    for m in range(0, tl.cdiv(count, BLOCK)):
        place = m * BLOCK + tl.arange(0, BLOCK)
        p_plan = plan + (first + place) * 3
        is_used = (place < count) & (first + place < num_segments)
        token = start + place * segment_size
        tl.store(p_plan, token, mask=is_used)
        tl.store(p_plan + 1, tl.minimum(end - token, segment_size), mask=is_used)
        tl.store(p_plan + 2, n + place * 0, mask=is_used)


@triton.jit
def mask_if(mask, condition):
    """``mask`` where a condition of the whole program holds; Triton 3.9's interpreter refuses ``mask & condition``."""
    return tl.where(condition, mask, False)

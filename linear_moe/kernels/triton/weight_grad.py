# mypy: allow-untyped-defs
"""Weight gradients of experts, summed by the product itself: nothing is written in half precision and read again.

A program owns a tile of one expert's sum. Programs of one expert are neighbours, so that they read its tokens from the
L2 cache. Both operands lie token by token; the tensor cores of Hopper read 16-bit ones from shared memory transposed.

Tiles are copied by descriptors of tensors, for which compute capability 9.0 has hardware: it computes addresses, leaves
out what lies outside, here other experts' rows, and adds a tile to what is in memory. That is as in every run: no
element of a sum is in two programs' tiles, so each is added to once in a call.

Letters: M tokens, E experts, O and I sizes of outputs and inputs.
"""

from __future__ import annotations

from contextvars import copy_context
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.triton import configs

TILES = {(128, 256): 3, (256, 128): 4}
"""Outputs and inputs of a program, and its stages: of what was timed on an H200, the fastest (docs/kernels.md)."""


@torch.no_grad()
def grouped_weight_grad_(total: Tensor, dy: Tensor, x: Tensor, ends: Tensor, add: bool) -> None:
    """See :func:`linear_moe.kernels.grouped_weight_grad_`.

    16-bit dy and x, float32 total, all of them contiguous; places and rows are multiples of 16 bytes.
    """
    if total.numel() == 0:
        return
    # The allocator is the context's, and the backward pass has a thread of its own: set for this launch, in a copy, so
    # that the caller's stays.
    copy_context().run(_launch, total, dy, x, ends, add)
    torch.autograd.graph.increment_version(total)


def _launch(total: Tensor, dy: Tensor, x: Tensor, ends: Tensor, add: bool) -> None:
    E, O, I = total.shape  # noqa: E741
    how = launch_options(O, I)
    tiles = triton.cdiv(O, how["BO"]) * triton.cdiv(I, how["BI"])
    # Where a program writes its descriptors: free again, for what follows on this stream, once it is launched.
    triton.set_allocator(lambda size, *others: torch.empty(size, dtype=torch.int8, device=total.device))
    reduce = not triton.knobs.runtime.interpret
    grouped_weight_grad_kernel[(E * tiles,)](dy, x, ends, total, O, I, ADD=add, REDUCE=reduce, **how)


def launch_options(O: int, I: int) -> dict[str, Any]:  # noqa: E741
    """The tile that computes least beside the sum, the first of two; a small one where products are small ones."""
    if not configs.has_wgmma():
        return dict(BO=64, BI=64, BM=32, num_warps=4, num_stages=3)
    BO, BI = min(TILES, key=lambda tile: _up(O, tile[0]) * _up(I, tile[1]))
    return dict(BO=BO, BI=BI, BM=64, num_warps=8, num_stages=TILES[BO, BI])


def _up(size: int, multiple: int) -> int:
    return size + -size % multiple


@triton.jit
def grouped_weight_grad_kernel(
    dy, x, ends, total, O: tl.constexpr, I: tl.constexpr,  # noqa: E741
    BO: tl.constexpr, BI: tl.constexpr, BM: tl.constexpr, ADD: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """``total`` (+)= dy^T x over each expert's tokens; REDUCE: memory adds. Grid: tiles, those of one expert together.

    A tile leaves by halves, which take half of the shared memory.
    """
    tiles_I: tl.constexpr = (I + BI - 1) // BI
    tiles: tl.constexpr = tiles_I * ((O + BO - 1) // BO)
    expert, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    number = tl.load(ends + expert) - first
    at_O, at_I = tile // tiles_I * BO, tile % tiles_I * BI
    dy += first.to(tl.int64) * O
    x += first.to(tl.int64) * I
    total += expert.to(tl.int64) * (O * I)
    rows = tl.maximum(number, 1)
    dys = tl.make_tensor_descriptor(dy, shape=[rows, O], strides=[O, 1], block_shape=[BM, BO])
    xs = tl.make_tensor_descriptor(x, shape=[rows, I], strides=[I, 1], block_shape=[BM, BI])
    sums = tl.make_tensor_descriptor(total, shape=[O, I], strides=[I, 1], block_shape=[BO, BI // 2])
    b_sum = tl.zeros([BO, BI], tl.float32)
    for block in range(tl.cdiv(number, BM)):
        b_sum = tl.dot(tl.trans(dys.load([block * BM, at_O])), xs.load([block * BM, at_I]), b_sum)
    b_left, b_right = tl.split(tl.permute(tl.reshape(b_sum, [BO, 2, BI // 2]), [0, 2, 1]))
    at_right = at_I + BI // 2
    if ADD and REDUCE:
        sums.atomic_add([at_O, at_I], b_left)
        sums.atomic_add([at_O, at_right], b_right)
    elif ADD:  # Triton's interpreter cannot
        sums.store([at_O, at_I], sums.load([at_O, at_I]) + b_left)
        sums.store([at_O, at_right], sums.load([at_O, at_right]) + b_right)
    else:
        sums.store([at_O, at_I], b_left)
        sums.store([at_O, at_right], b_right)

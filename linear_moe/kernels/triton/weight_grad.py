# mypy: allow-untyped-defs
"""Weight gradients of experts, summed by the product itself: nothing is written in half precision and read again.

A program owns a tile of one expert's sum, which it reads at most once and writes once. Programs of one expert are
neighbours, so that they read its tokens from the L2 cache. Both operands lie token by token; the tensor cores of Hopper
read 16-bit ones from shared memory transposed.

Letters: M tokens, E experts, O and I sizes of outputs and inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.triton import configs

TILES = ((128, 256), (256, 128), (128, 128))
"""Outputs and inputs of a program. A square one has half of the warps, and two fit a multiprocessor."""


@torch.no_grad()
def grouped_weight_grad_(total: Tensor, dy: Tensor, x: Tensor, ends: Tensor, add: bool) -> None:
    """See :func:`linear_moe.kernels.grouped_weight_grad_`; 16-bit dy and x, float32 total, all of them contiguous."""
    E, O, I = total.shape  # noqa: E741
    if total.numel() == 0:
        return
    how = launch_options(O, I)
    tiles = _up(O, how["BO"]) * _up(I, how["BI"]) // (how["BO"] * how["BI"])
    grouped_weight_grad_kernel[(E * tiles,)](dy, x, ends, total, O, I, ADD=add, **how)
    torch.autograd.graph.increment_version(total)


def launch_options(O: int, I: int) -> dict[str, Any]:  # noqa: E741
    """The tile that computes least beside the sum, the first of several; smaller ones where products are small ones."""
    if not configs.has_wgmma():
        return dict(BO=64, BI=64, BM=32, num_warps=4, num_stages=3)
    BO, BI = min(TILES, key=lambda tile: _up(O, tile[0]) * _up(I, tile[1]))
    return dict(BO=BO, BI=BI, BM=64, num_warps=8 if BO * BI > 128 * 128 else 4, num_stages=3)


def _up(size: int, multiple: int) -> int:
    return size + -size % multiple


@triton.jit
def grouped_weight_grad_kernel(
    dy, x, ends, total, O: tl.constexpr, I: tl.constexpr,  # noqa: E741
    BO: tl.constexpr, BI: tl.constexpr, BM: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """``total`` (+)= dy^T x over each expert's tokens. Grid: tiles, those of one expert together."""
    tiles_I: tl.constexpr = (I + BI - 1) // BI
    tiles: tl.constexpr = tiles_I * ((O + BO - 1) // BO)
    expert, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    last = tl.load(ends + expert)
    i_O = tile // tiles_I * BO + tl.arange(0, BO)
    i_I = tile % tiles_I * BI + tl.arange(0, BI)
    i_M = tl.arange(0, BM)
    m_O, m_I = (i_O < O) | (O % BO == 0), (i_I < I) | (I % BI == 0)
    dy += (first + i_M).to(tl.int64)[:, None] * O + i_O[None, :]
    x += (first + i_M).to(tl.int64)[:, None] * I + i_I[None, :]
    total += expert.to(tl.int64) * (O * I) + i_O[:, None] * I + i_I[None, :]
    m_OI = m_O[:, None] & m_I[None, :]
    if ADD:  # before the loop: after it, registers would be too few
        b_sum = tl.load(total, mask=m_OI, other=0.0)
    else:
        b_sum = tl.zeros([BO, BI], tl.float32)
    for block in range(tl.cdiv(last - first, BM)):
        m_M = (block * BM + i_M < last - first)[:, None]
        b_dy = tl.load(dy, mask=m_M & m_O[None, :], other=0.0)
        b_x = tl.load(x, mask=m_M & m_I[None, :], other=0.0)
        b_sum = tl.dot(tl.trans(b_dy), b_x, b_sum)
        dy += BM * O
        x += BM * I
    tl.store(total, b_sum, mask=m_OI)

# mypy: allow-untyped-defs
"""Fused routing (routes.py): one pass over the logits, and a counting sort of the slots, without atomics.

A program owns BN tokens with all experts. What it counts goes to a row of its own, and rows are added in order:

    place of token t's slot at expert e = slots of experts before e + those of e in programs before + in rows before

Letters: N tokens, E experts (EP: the power of two above), K experts of a token, P programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linear_moe.kernels.once import once_differentiable


def choose_experts(
    x: Tensor,
    per_token: int,
    *,
    among_chosen: bool = False,
    factor: float = 1.0,
    is_token: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`linear_moe.kernels.choose_experts`; float32, float16 and bfloat16."""
    is_token = None if is_token is None else is_token.contiguous().view(torch.uint8)
    return _Choice.apply(x.contiguous(), is_token, per_token, among_chosen, factor)  # type: ignore[no-any-return]


def sort_slots(chosen: Tensor, probs: Tensor, per_token: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`linear_moe.kernels.sort_slots`."""
    return _Sort.apply(chosen.contiguous().view(torch.uint8), probs.contiguous(), per_token)  # type: ignore[no-any-return]


class _Choice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, is_token: Tensor | None, per_token: int, among_chosen: bool, factor: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grid, shape = _grid(x)
        probs, chosen = torch.empty_like(x), torch.empty_like(x, dtype=torch.uint8)
        sums = x.new_empty(grid[0], 2, x.shape[1], dtype=torch.float32)
        choice_forward_kernel[grid](
            x, x if is_token is None else is_token, probs, chosen, sums, len(x), factor,
            K=per_token, AMONG=among_chosen, MASKED=is_token is not None, **shape,
        )  # fmt: skip
        ctx.save_for_backward(x, chosen, is_token)
        ctx.among_chosen, ctx.factor = among_chosen, factor
        score_sum, count = sums.sum(0).unbind()
        result = chosen.view(torch.bool)
        ctx.mark_non_differentiable(result, count)
        ctx.set_materialize_grads(False)
        return probs, result, score_sum, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        x, chosen, is_token = ctx.saved_tensors
        d_probs, _, d_sum, _ = grads
        if d_probs is None and d_sum is None:
            return None, None, None, None, None
        grid, shape = _grid(x)
        dx = torch.empty_like(x)
        choice_backward_kernel[grid](
            x, chosen, x if is_token is None else is_token,
            x if d_probs is None else d_probs.contiguous(), x if d_sum is None else d_sum.contiguous(),
            dx, len(x), ctx.factor, AMONG=ctx.among_chosen, MASKED=is_token is not None,
            HAS_PROBS=d_probs is not None, HAS_SUM=d_sum is not None, **shape,
        )  # fmt: skip
        return dx, None, None, None, None


class _Sort(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, chosen: Tensor, probs: Tensor, per_token: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (num_tokens, E), num_slots = chosen.shape, chosen.shape[0] * per_token
        grid, shape = _grid(chosen)
        counts, starts = torch.empty(2, E, grid[0], dtype=torch.int32, device=chosen.device).unbind()
        slot_count_kernel[grid](chosen, counts, num_tokens, K=per_token, **shape)
        total = torch.empty(E, dtype=torch.int32, device=chosen.device)
        slot_start_kernel[(E,)](counts, starts, total, grid[0], BLOCK=4096, num_warps=8)
        order = torch.empty(num_slots, dtype=torch.int64, device=chosen.device)
        place = torch.empty(num_tokens, per_token, dtype=torch.int64, device=chosen.device)
        sorted_probs = probs.new_empty(num_slots)
        slot_place_kernel[grid](
            chosen, probs, starts, order, place, sorted_probs, num_tokens, K=per_token, **shape
        )
        ctx.save_for_backward(chosen, place)
        ctx.mark_non_differentiable(order, place, total)
        ctx.set_materialize_grads(False)  # those of numbers would be zeros, a launch each
        return order, place, total, sorted_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, Tensor | None, None]:
        chosen, place = ctx.saved_tensors
        if grads[3] is None:
            return None, None, None
        grid, shape = _grid(chosen)
        d_probs = torch.empty_like(chosen, dtype=grads[3].dtype)
        slot_gradient_kernel[grid](
            chosen, place, grads[3].contiguous(), d_probs, len(chosen), K=place.shape[1], **shape
        )
        return None, d_probs, None


def _grid(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """2048 pairs of token and expert for a program: of more, registers would spill."""
    num_experts = triton.next_power_of_2(x.shape[1])
    block = max(1, min(32, 2048 // num_experts))
    return (triton.cdiv(x.shape[0], block),), dict(E=x.shape[1], EP=num_experts, BN=block, num_warps=4)


@triton.jit
def _tile(num_tokens, E: tl.constexpr, EP: tl.constexpr, BN: tl.constexpr):
    """Offsets and mask of a program's tokens and their experts."""
    i_N = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    i_E = tl.arange(0, EP)
    return i_N[:, None] * E + i_E[None, :], (i_N[:, None] < num_tokens) & (i_E[None, :] < E)


@triton.jit
def _softmax(b_x, m):
    """Over rows; 0 outside of the mask."""
    b_x = tl.where(m, b_x, float("-inf"))
    top = tl.max(b_x, 1)
    b_x = tl.exp(b_x - tl.where(top == float("-inf"), 0.0, top)[:, None])
    total = tl.sum(b_x, 1)
    return b_x / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _taken(chosen, p, m, K: tl.constexpr):
    """int32: K experts of each token; the first others, where fewer are chosen."""
    b_c = (tl.load(chosen + p, mask=m, other=0) != 0).to(tl.int32)
    b_c = tl.where(tl.cumsum(b_c, 1) <= K, b_c, 0)
    b_other = tl.where(m, 1 - b_c, 0)
    missing = K - tl.sum(b_c, 1)
    return tl.where(tl.cumsum(b_other, 1) <= missing[:, None], b_c | b_other, b_c)


@triton.jit(do_not_specialize=["num_tokens"])
def choice_forward_kernel(
    x, is_token, probs, chosen, sums, num_tokens, factor,
    K: tl.constexpr, AMONG: tl.constexpr, MASKED: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Probabilities, choice, and sums over the program's tokens. Grid: (P,)."""
    p, m = _tile(num_tokens, E, EP, BN)
    b_x = tl.load(x + p, mask=m, other=float("-inf")).to(tl.float32)
    i_E = tl.arange(0, EP)
    b_left, b_c = b_x, tl.zeros([BN, EP], tl.int32)
    for _ in tl.static_range(K):  # of equal ones the first
        is_best = (i_E[None, :] == tl.argmax(b_left, 1)[:, None]) & m
        b_c = tl.where(is_best, 1, b_c)
        b_left = tl.where(is_best, float("-inf"), b_left)
    b_s = _softmax(b_x, m)
    b_p = tl.where(b_c != 0, _softmax(b_x, b_c != 0) if AMONG else b_s, 0.0) * factor
    # A logit that is no number may be passed over, and its token's experts be any: their probabilities show it.
    is_wrong = (tl.max(((b_x != b_x) & m).to(tl.int32), 1) != 0) | (tl.max(b_x, 1) == float("-inf"))
    b_p = tl.where(is_wrong[:, None], float("nan"), b_p)
    tl.store(probs + p, b_p.to(probs.dtype.element_ty), mask=m)
    tl.store(chosen + p, b_c.to(tl.uint8), mask=m)
    m_counted = m
    if MASKED:
        i_N = tl.program_id(0) * BN + tl.arange(0, BN)
        m_counted = m & (tl.load(is_token + i_N, mask=i_N < num_tokens, other=0) != 0)[:, None]
    sums += tl.program_id(0) * (2 * E) + i_E
    tl.store(sums, tl.sum(tl.where(m_counted, b_s, 0.0), 0), mask=i_E < E)
    tl.store(sums + E, tl.sum(tl.where(m_counted, b_c, 0), 0).to(tl.float32), mask=i_E < E)


@triton.jit(do_not_specialize=["num_tokens"])
def choice_backward_kernel(
    x, chosen, is_token, d_probs, d_sum, dx, num_tokens, factor,
    AMONG: tl.constexpr, MASKED: tl.constexpr, HAS_PROBS: tl.constexpr, HAS_SUM: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dx = s (g - sum of s g), once for all experts and, AMONG the chosen, once more for these. Grid: (P,)."""
    p, m = _tile(num_tokens, E, EP, BN)
    b_x = tl.load(x + p, mask=m, other=float("-inf")).to(tl.float32)
    i_E = tl.arange(0, EP)
    b_g, b_dx = tl.zeros([BN, EP], tl.float32), tl.zeros([BN, EP], tl.float32)
    if HAS_SUM:
        b_g += tl.load(d_sum + i_E, mask=i_E < E, other=0.0).to(tl.float32)[None, :]
        if MASKED:
            i_N = tl.program_id(0) * BN + tl.arange(0, BN)
            b_g = tl.where((tl.load(is_token + i_N, mask=i_N < num_tokens, other=0) != 0)[:, None], b_g, 0.0)
    if HAS_PROBS:
        m_c = tl.load(chosen + p, mask=m, other=0) != 0
        b_h = tl.where(m_c, tl.load(d_probs + p, mask=m, other=0.0).to(tl.float32) * factor, 0.0)
        if AMONG:
            b_q = _softmax(b_x, m_c)
            b_dx = b_q * (b_h - tl.sum(b_q * b_h, 1)[:, None])
        else:
            b_g += b_h
    if HAS_SUM or not AMONG:
        b_s = _softmax(b_x, m)
        b_dx += b_s * (b_g - tl.sum(b_s * b_g, 1)[:, None])
    tl.store(dx + p, b_dx.to(dx.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["num_tokens"])
def slot_count_kernel(
    chosen, counts, num_tokens, K: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BN: tl.constexpr
):
    """How many of the program's slots each expert has. Grid: (P,)."""
    p, m = _tile(num_tokens, E, EP, BN)
    i_E = tl.arange(0, EP)
    b_count = tl.sum(_taken(chosen, p, m, K), 0)
    tl.store(counts + i_E * tl.num_programs(0) + tl.program_id(0), b_count, mask=i_E < E)


@triton.jit(do_not_specialize=["num_programs"])
def slot_start_kernel(counts, starts, total, num_programs, BLOCK: tl.constexpr):
    """``counts [E, P]`` to where each program's slots of each expert begin; slots of each expert. Grid: (E,)."""
    before, i = tl.program_id(0) * num_programs, tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.int32)
    for first in range(0, before, BLOCK):
        b_sum += tl.load(counts + first + i, mask=first + i < before, other=0)
    base = tl.sum(b_sum, 0)
    start = base
    for first in range(0, num_programs, BLOCK):
        m = first + i < num_programs
        b_count = tl.load(counts + before + first + i, mask=m, other=0)
        tl.store(starts + before + first + i, start + tl.cumsum(b_count, 0) - b_count, mask=m)
        start += tl.sum(b_count, 0)
    tl.store(total + tl.program_id(0), start - base)


@triton.jit(do_not_specialize=["num_tokens"])
def slot_place_kernel(
    chosen, probs, starts, order, place, sorted_probs, num_tokens,
    K: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Each slot's place, and what belongs there. Grid: (P,)."""
    p, m = _tile(num_tokens, E, EP, BN)
    i_E = tl.arange(0, EP)
    i_N = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    b_c = _taken(chosen, p, m, K)
    b_start = tl.load(starts + i_E * tl.num_programs(0) + tl.program_id(0), mask=i_E < E, other=0)
    b_place = (b_start[None, :] + tl.cumsum(b_c, 0) - b_c).to(tl.int64)
    b_slot = i_N[:, None] * K + tl.cumsum(b_c, 1) - b_c
    m_c = m & (b_c != 0)
    tl.store(place + b_slot, b_place, mask=m_c)
    tl.store(order + b_place, b_slot, mask=m_c)
    tl.store(sorted_probs + b_place, tl.load(probs + p, mask=m_c, other=0.0), mask=m_c)


@triton.jit(do_not_specialize=["num_tokens"])
def slot_gradient_kernel(
    chosen, place, d_sorted, d_probs, num_tokens,
    K: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradients of sorted probabilities back to tokens and experts. Grid: (P,)."""
    p, m = _tile(num_tokens, E, EP, BN)
    i_N = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    b_c = _taken(chosen, p, m, K)
    m_c = m & (b_c != 0)
    b_place = tl.load(place + i_N[:, None] * K + tl.cumsum(b_c, 1) - b_c, mask=m_c, other=0)
    tl.store(d_probs + p, tl.load(d_sorted + b_place, mask=m_c, other=0.0), mask=m)

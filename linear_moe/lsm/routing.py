"""Tokens to memories and back: which slots each memory reads, in the order of time, without waiting for the device.

A token fills ``k`` slots, one for each memory that it chose. Slots sorted by (memory, run), stably, are runs of their
own: packed documents of one row. Every shape follows from the number of tokens, none from what was chosen.

Letters: S tokens of all rows, N runs, E memories, k memories per token, M = S * k slots, D any channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linear_moe.kernels import collect_rows, spread_rows
from linear_moe.kernels.routes import stable_order


@dataclass(frozen=True)
class Slots:
    """Where every slot of every token goes.

    Attributes:
        order: ``[M]`` int64, slots (``token * k + choice``) sorted by memory, run and time; dropped ones last.
        place: ``[M]`` int64, the inverse: where each slot went.
        memory: ``[M]`` int64, the memory of each sorted slot; E for dropped ones.
        cu_seqlens: ``[E * N + 1]`` int64, runs of all memories, memory by memory; ends before dropped slots.
        per_token: k.
        num_memories: E.
    """

    order: Tensor
    place: Tensor
    memory: Tensor
    cu_seqlens: Tensor
    per_token: int
    num_memories: int

    @classmethod
    def sort(
        cls, choice_Sk: Tensor, run_S: Tensor, num_memories: int, num_runs: int, limit_N: Tensor | None = None
    ) -> Slots:
        """Sort slots by memory and run; within these they stay in the order of time.

        Args:
            choice_Sk: memories that each token chose, int64, all different.
            run_S: run of each token, never falling.
            num_memories: E.
            num_runs: N.
            limit_N: slots that a memory takes of each run, the first ones; ``None``: all.
        """
        num_slots, per_token = choice_Sk.numel(), choice_Sk.shape[1]
        keys = torch.arange(num_memories * num_runs + 1, device=run_S.device)
        key_M = (choice_Sk * num_runs + run_S[:, None]).flatten()
        order = stable_order(key_M, num_memories * num_runs)
        key_M = key_M[order]
        if limit_N is not None:
            starts = torch.searchsorted(key_M, keys)
            rank_M = torch.arange(num_slots, device=run_S.device) - starts[key_M]
            dropped = rank_M >= limit_N[key_M % num_runs]
            key_M = key_M.masked_fill(dropped, num_memories * num_runs)
            kept_first = stable_order(key_M, num_memories * num_runs)
            order, key_M = order[kept_first], key_M[kept_first]
        place = torch.empty_like(order).scatter_(0, order, torch.arange(num_slots, device=run_S.device))
        bounds = torch.searchsorted(key_M, keys)
        return cls(order, place, key_M // num_runs, bounds, per_token, num_memories)

    @property
    def ends(self) -> Tensor:
        """``[E]`` int32, where each memory's sorted slots end; dropped ones count to the last."""
        num_slots = self.order.shape[0]
        ends = torch.searchsorted(
            self.memory, torch.arange(self.num_memories, device=self.memory.device), right=True
        )
        return torch.where(
            torch.arange(len(ends), device=ends.device) == len(ends) - 1, num_slots, ends
        ).int()

    def gather(self, x_SD: Tensor) -> Tensor:
        """``[S, ...]`` of tokens to ``[M, ...]`` of sorted slots."""
        return spread_rows(x_SD, self.order, self.place.view(-1, self.per_token))

    def scatter(self, x_MD: Tensor, weight_Sk: Tensor | None = None) -> Tensor:
        """``[M, ...]`` of sorted slots to ``[S, ...]``: the sum of each token's slots, weighted if asked for."""
        return collect_rows(x_MD, self.order, self.place.view(-1, self.per_token), weight_Sk)


def route(logits_BTE: Tensor, per_token: int) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities ``[B, T, E]``, and each token's memories with their weights, ``[B, T, k]``, which sum to 1.

    A softmax over all memories in the logits' dtype (float32), its k largest, divided by their sum (arXiv:2502.13685,
    section 3.1).
    """
    probs_BTE = logits_BTE.softmax(-1)
    weight_BTk, choice_BTk = probs_BTE.topk(per_token, dim=-1)
    return probs_BTE, weight_BTk / weight_BTk.sum(-1, keepdim=True), choice_BTk

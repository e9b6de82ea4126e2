"""From logits to a token: the most probable one, or a draw from the probable ones.

    p = softmax(logits / temperature), cut to the top_k most probable, then to the smallest set that holds top_p
    token = the first whose cumulated p is above u, u uniform in [0, 1)

One number u per row and step decides, so a row's draws depend on its own seed alone, and a step draws nothing itself:
it can be part of a CUDA graph.

Letters: B sequences, V tokens of the vocabulary, K of them that may be drawn, T steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token."""

    temperature: float = 0.0
    """Divides the logits; 0: always the most probable token (greedy)."""
    top_k: int = 0
    """Draw from the so many most probable tokens; 0: no limit."""
    top_p: float = 1.0
    """Draw from the fewest most probable tokens that together hold this probability."""

    def __post_init__(self) -> None:
        _require(
            self.temperature >= 0, f"temperature is {self.temperature}", "logits are divided by it", "0.8"
        )
        _require(self.top_k >= 0, f"top_k is {self.top_k}", "it counts tokens; 0 is no limit", "40")
        _require(0 < self.top_p <= 1, f"top_p is {self.top_p}", "it is a probability; 1 is no limit", "0.9")

    def choose(self, logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
        """Tokens ``[B]`` int64 from ``logits_BV`` ``[B, V]`` and ``uniform_B`` in [0, 1), which greedy ignores."""
        if self.temperature == 0:
            return logits_BV.argmax(dim=-1)
        p_BK, tokens_BK = self._candidates(logits_BV)
        sums_BK = p_BK.double().cumsum(dim=-1)
        total_B1 = sums_BK[:, -1:]
        place_B1 = torch.searchsorted(sums_BK, uniform_B.double()[:, None] * total_B1, right=True)
        last_B1 = torch.searchsorted(sums_BK, total_B1.contiguous())  # of those that have any probability
        place_B1 = torch.minimum(place_B1, last_B1)
        return (place_B1 if tokens_BK is None else tokens_BK.gather(1, place_B1)).squeeze(1)

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """What ``choose`` draws from, ``[B, V]``; temperature above 0."""
        p_BK, tokens_BK = self._candidates(logits_BV)
        p_BK = p_BK / p_BK.sum(dim=-1, keepdim=True)
        return p_BK if tokens_BK is None else torch.zeros_like(logits_BV).scatter(1, tokens_BK, p_BK)

    def _candidates(self, logits_BV: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights of the tokens that may be drawn ``[B, K]``, and the tokens; None: the whole vocabulary in order."""
        size, logits_BV = logits_BV.shape[-1], logits_BV / self.temperature
        if self.top_p == 1 and not 0 < self.top_k < size:
            return logits_BV.softmax(dim=-1), None  # a sort of the vocabulary costs more than all the rest
        values_BK, tokens_BK = logits_BV.topk(min(self.top_k or size, size), dim=-1)  # sorted, largest first
        p_BK = values_BK.softmax(dim=-1)
        if self.top_p < 1:
            before_BK = p_BK.cumsum(dim=-1) - p_BK  # 0 for the first, which always stays
            p_BK = p_BK.masked_fill(before_BK >= self.top_p, 0.0)
        return p_BK, tokens_BK


def draws(seeds: Sequence[int], steps: int, device: torch.device) -> Tensor:
    """``[T, B]`` float64 uniform in [0, 1): column b depends on ``seeds[b]`` alone, and more steps do not change it."""
    columns = [
        torch.rand(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]
    return torch.stack(columns, dim=1).to(device)


def _require(holds: bool, what: str, why: str, instead: str) -> None:
    if not holds:
        raise ValueError(f"{what}\n  why: {why}\n  try: {what.split()[0]}={instead}")

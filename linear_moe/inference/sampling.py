"""From logits to a token: the most probable one, or a draw from the probable ones.

    p = softmax(logits / temperature), cut to the top_k most probable, then to the smallest set that holds top_p

Letters: B sequences, V tokens of the vocabulary.
"""

from __future__ import annotations

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

    def choose(self, logits_BV: Tensor, generator: torch.Generator) -> Tensor:
        """Tokens ``[B]`` int64 from ``logits_BV`` ``[B, V]`` float32; greedy draws nothing from ``generator``."""
        if self.temperature == 0:
            return logits_BV.argmax(dim=-1)
        return torch.multinomial(self.probabilities(logits_BV), 1, generator=generator).squeeze(1)

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """What ``choose`` draws from, ``[B, V]``; temperature above 0."""
        count = min(self.top_k or logits_BV.shape[-1], logits_BV.shape[-1])
        values_BK, tokens_BK = (logits_BV / self.temperature).topk(count, dim=-1)  # sorted, largest first
        p_BK = values_BK.softmax(dim=-1)
        before_BK = p_BK.cumsum(dim=-1) - p_BK  # 0 for the first, which always stays
        p_BK = p_BK.masked_fill(before_BK >= self.top_p, 0.0) if self.top_p < 1 else p_BK
        p_BK = p_BK / p_BK.sum(dim=-1, keepdim=True)
        return torch.zeros_like(logits_BV).scatter(1, tokens_BK, p_BK)


def _require(holds: bool, what: str, why: str, instead: str) -> None:
    if not holds:
        raise ValueError(f"{what}\n  why: {why}\n  try: {what.split()[0]}={instead}")

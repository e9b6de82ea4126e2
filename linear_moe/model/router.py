"""Megatron's router, with a balance loss that weighs the same in every layout when sequences have padding.

Gradients are divided by the tokens of a step, so Megatron multiplies the loss by those of the micro-batch: local ones
times ranks. With padding it takes the number of all ranks for the local one (it reads the tensor that an all-reduce has
just overwritten), and the loss would weigh TP x CP times too much.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class Router(TopKRouter):
    """Counts tokens that are no padding by itself."""

    _mean_tokens: Tensor | None = None
    """Such tokens of the micro-batch, over ranks that share it; ``None`` without padding."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As Megatron's; ``padding_mask`` is true where a token is padding."""
        self._mean_tokens = None
        if padding_mask is not None:
            self._mean_tokens = (~padding_mask).sum().float()
            if self.tp_cp_group.size() > 1:
                dist.all_reduce(self._mean_tokens, group=self.tp_cp_group)
            self._mean_tokens /= self.tp_cp_group.size()
        return super().routing(logits, padding_mask)

    def attach_and_log_load_balancing_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Megatron's, with this count."""
        if self._mean_tokens is not None:
            kwargs["valid_token_count"] = self._mean_tokens
        return super().attach_and_log_load_balancing_loss(*args, **kwargs)

"""Megatron's router without float32 copies of its input, and with a balance loss that weighs the same in every layout.

Logits are float32, of bfloat16 tokens and weights: products of two bfloat16 are exact there, so tensor cores compute
them as well as float32 copies would. Going back, a float32 gradient is two bfloat16, which differ from it by 2^-17:

    g = high + low,    dx = [high low] [W; W],    dW = high^T x + low^T x

Gradients are divided by the tokens of a step, so Megatron multiplies the loss by those of the micro-batch: local ones
times ranks. With padding it takes the number of all ranks for the local one (it reads the tensor that an all-reduce has
just overwritten), and the loss would weigh TP x CP times too much.

Letters: N tokens, D hidden, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.autograd.function import once_differentiable


class Router(TopKRouter):
    """Counts tokens that are no padding by itself."""

    _mean_tokens: Tensor | None = None
    """Such tokens of the micro-batch, over ranks that share it; ``None`` without padding."""

    def gating(self, input: Tensor) -> Tensor:
        """``[.., D]`` to logits ``[.., E]``, as Megatron's."""
        halves = input.dtype == self.weight.dtype == torch.bfloat16
        if input.is_cuda and halves and self.bias is None and self.config.moe_router_dtype == "fp32":
            return logits(input, self.weight)
        return super().gating(input)

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


def logits(x: Tensor, weight_ED: Tensor) -> Tensor:
    """``[.., D]`` times ``[E, D]``, both bfloat16: ``[.., E]`` float32."""
    out_NE: Tensor = _Logits.apply(x.reshape(-1, x.shape[-1]), weight_ED)
    return out_NE.view(*x.shape[:-1], -1)


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight_ED)
        return _in_float32(x_ND, weight_ED.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x_ND, weight_ED = ctx.saved_tensors
        halves_N2E = torch.cat(in_halves(grads[0]), dim=1)
        d_x = halves_N2E @ torch.cat([weight_ED, weight_ED])
        d_high, d_low = _in_float32(halves_N2E.t(), x_ND).chunk(2)
        return d_x, (d_high + d_low).to(weight_ED.dtype)


def in_halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as the sum of two in bfloat16."""
    high = x.to(torch.bfloat16)
    return high, (x - high).to(torch.bfloat16)


def _in_float32(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()

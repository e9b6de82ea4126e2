"""Megatron's router without float32 copies of its input, and with a balance loss that weighs the same in every layout.

A balance loss counts the experts that tokens chose. Megatron chooses them once more for it, of probabilities; here the
first choice is counted where it is the same one: the softmax is monotonous, and of equal numbers torch takes those that
it would take of any others in this order. (Two logits that differ may have one probability. Then Megatron may count
another expert than the token goes to.) On a GPU one kernel makes the choice, the probabilities and the sums over tokens
that the loss is made of; Megatron's forty launches keep a host busy for longer than the GPU needs for the layer.

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
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear_moe.kernels import choose_experts, dispatch


class Router(TopKRouter):
    """Counts tokens that are no padding by itself."""

    _mean_tokens: Tensor | None = None
    """Such tokens of the micro-batch, over ranks that share it; ``None`` without padding."""
    _is_choosing = False
    """Whether the loss waits for the choice."""
    tokens_E: Tensor | None = None
    """How many tokens of the last call chose each expert, where that is known already."""

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
        self.tokens_E = None
        if not self._counts_its_choice():
            return super().routing(logits, padding_mask)
        if self._is_fused(logits):
            return self._route_fused(logits, padding_mask)
        self._is_choosing = True
        try:
            probs_NE, chosen_NE = super().routing(logits, padding_mask)
        finally:
            self._is_choosing = False
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            probs_NE = self._balanced(probs_NE, chosen_NE, logits, padding_mask)
        return probs_NE, chosen_NE

    def is_aux_loss_enabled(self) -> bool:
        """As Megatron's, but not while it chooses."""
        return not self._is_choosing and super().is_aux_loss_enabled()

    def _counts_its_choice(self) -> bool:
        """Whether nothing but scores decides where tokens go."""
        config = self.config
        return (
            self.score_function == "softmax"
            and self.routing_type not in ("sinkhorn", "quantile_balancing")
            and config.moe_router_num_groups is None
            and config.moe_expert_capacity_factor is None
            and not config.moe_router_fusion
            and not config.moe_router_padding_for_quantization  # which writes into the choice
            and self.expert_bias is None
            and self.router_replay is None
        )

    def _is_fused(self, logits: Tensor) -> bool:
        """Whether one kernel does it all: on a GPU, with a loss that needs no more than sums over all tokens."""
        types = self.routing_type if isinstance(self.routing_type, list) else [self.routing_type]
        return {*types} <= {"aux_loss", "none"} and (
            dispatch.pick("choose_experts", logits.device, logits.dtype).name == "triton"
        )

    def _route_fused(self, logits: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        config, group = self.config, self.tp_cp_group
        is_padding_N = None if padding_mask is None else padding_mask.reshape(-1)
        logits_NE = self.apply_z_loss(logits.reshape(-1, logits.shape[-1]), padding_mask=is_padding_N)
        probs_NE, chosen_NE, scores_E, tokens_E = choose_experts(
            logits_NE,
            self.topk,
            among_chosen=not config.moe_router_pre_softmax,
            factor=config.moe_router_topk_scaling_factor or 1.0,
            is_token=None if is_padding_N is None else ~is_padding_N,
        )
        if is_padding_N is None:
            self.tokens_E = tokens_E
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            if group.size() > 1:  # in place
                tokens_E = reduce_from_tensor_model_parallel_region(tokens_E.clone(), group)
            local = len(logits_NE) if self._mean_tokens is None else self._mean_tokens
            coefficient = self.get_aux_loss_coeff("aux_loss")
            loss = switch_load_balancing_loss_func(
                probs=scores_E[None],
                tokens_per_expert=tokens_E,
                total_num_tokens=local * group.size(),
                topk=self.topk,
                num_experts=config.num_moe_experts,
                moe_aux_loss_coeff=coefficient,
            )
            probs_NE = self.attach_and_log_load_balancing_loss(
                probs_NE, coefficient, loss, "load_balancing_loss", group, valid_token_count=local
            )
        return probs_NE, chosen_NE

    def _balanced(
        self, probs_NE: Tensor, chosen_NE: Tensor, logits: Tensor, padding_mask: Tensor | None
    ) -> Tensor:
        """The probabilities, with the gradients of all balance losses attached."""
        scores_NE = torch.softmax(logits.view(probs_NE.shape), dim=-1, dtype=torch.float32)
        if padding_mask is not None:
            is_token_N1 = ~padding_mask.reshape(-1, 1)
            scores_NE, chosen_NE = scores_NE * is_token_N1, chosen_NE & is_token_N1
        counted: Any = dict(with_padding_mask=padding_mask is not None)
        probs_NE = self._apply_aux_loss(probs_NE, scores_NE, chosen_NE, **counted)
        probs_NE = self._apply_seq_aux_loss(probs_NE, scores_NE, chosen_NE, *logits.shape[:2], **counted)
        return self._apply_global_aux_loss(probs_NE, scores_NE, chosen_NE, **counted)

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

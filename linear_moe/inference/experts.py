"""Experts of a process that has them all: tokens stay where they are, sorted by expert, and nothing waits.

Megatron's dispatchers serve expert parallelism: they read counts on the host, which a CUDA graph cannot do, and expect
tensor-parallel ranks to hold different tokens. While decoding every rank holds every token, so each computes its slice
of every expert, and one sum over the ranks is all there is to send. A token's sum over its experts is in the order of
the experts, whatever the other tokens chose.

Letters: N tokens, E experts, k experts per token, M = N * k slots, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from linear_moe.kernels.grouped_linear import can_group
from linear_moe.model.experts import GroupedExperts


class LocalDispatcher:
    """In the place of a layer's ``token_dispatcher``, with its methods.

    Args:
        per_token: k.
        tp_group: ranks that hold slices of the same experts.
    """

    def __init__(self, per_token: int, tp_group: Any) -> None:
        self.per_token, self.tp_group = per_token, tp_group

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``[T, B, D]`` and ``[N, E]`` to the sorted slots ``[M, D]`` and their probabilities."""
        self.shape = hidden_states.shape
        experts_Nk = routing_map.byte().argsort(dim=1, descending=True, stable=True)[:, : self.per_token]
        order_M = experts_Nk.flatten().argsort(stable=True)
        self.place_M = torch.empty_like(order_M).scatter_(
            0, order_M, torch.arange(order_M.shape[0], device=order_M.device)
        )
        self.tokens_per_expert = routing_map.sum(0)
        slots = hidden_states.reshape(-1, self.shape[-1])[order_M // self.per_token]
        return slots, probs.gather(1, experts_Nk).flatten()[order_M]

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing to send."""
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The slots, how many each expert has, and the probabilities."""
        return hidden_states, self.tokens_per_expert, probs

    def get_expert_zero_copy_buffers(self) -> tuple[None, None]:
        """None."""
        return None, None

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """The sum over each token's experts."""
        total: Tensor = hidden_states[self.place_M].unflatten(0, (-1, self.per_token)).sum(1)
        return total

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """The sum over the ranks' slices."""
        if self.tp_group.size() > 1:
            torch.distributed.all_reduce(hidden_states, group=self.tp_group)
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """As the tokens came."""
        return hidden_states.view(self.shape)


def keep_tokens_here(model: GPTModel) -> None:
    """Have every layer of experts use a :class:`LocalDispatcher`; a second call does nothing."""
    for module in model.modules():
        if isinstance(module, MoELayer) and not isinstance(module.token_dispatcher, LocalDispatcher):
            config = module.config
            assert config.expert_model_parallel_size == 1 and config.moe_expert_capacity_factor is None
            module.token_dispatcher = LocalDispatcher(
                config.moe_router_topk, module.token_dispatcher.tp_group
            )


def waits_for_host(model: GPTModel) -> str | None:
    """Why a step of the model reads something on the host, so that no CUDA graph can hold it; None: it does not."""
    for module in model.modules():
        if isinstance(module, MoELayer):
            experts = module.experts
            if not isinstance(experts, GroupedExperts):
                return "experts one after the other (--sequential-experts) read their tokens' number"
            weight = experts.fc1_weight
            if not can_group(weight.new_empty(1, weight.shape[2]), weight, experts.fc2_weight):
                return f"experts in {weight.dtype} run one after the other and read their tokens' number"
    return None

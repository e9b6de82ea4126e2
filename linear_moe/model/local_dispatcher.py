"""Experts that are all on this rank: tokens are sorted by expert where they are, once, and nothing waits for a device.

Megatron's dispatchers serve expert parallelism. Without it they still copy the tokens a second time, expert by expert,
and read on the host how many each has. Here slots are sorted by expert on the device: one gather, and a sum back over
each token's experts in the order of the experts, whatever the other tokens chose.

Letters: N tokens, E experts, k experts per token, M = N * k slots, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from linear_moe.kernels import collect_rows, sort_slots, spread_rows
from linear_moe.model.experts import GroupedExperts


class LocalDispatcher:
    """Replaces a layer's ``token_dispatcher``, whose methods it has.

    Args:
        per_token: k.
        tp_group: ranks that hold the same tokens and slices of the same experts, whose outputs are summed (not their
            gradients: for inference); ``None``: this rank has whole experts.
        makes_again: whether to set ``again``, a function that gathers the slots of the present call once more.
    """

    again: Callable[[], Tensor]

    def __init__(
        self,
        per_token: int,
        tp_group: torch.distributed.ProcessGroup | None = None,
        makes_again: bool = False,
    ) -> None:
        self.per_token, self.tp_group, self.makes_again = per_token, tp_group, makes_again

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``[T, B, D]`` and ``[N, E]`` to the sorted slots ``[M, D]`` and their probabilities."""
        self.shape = hidden_states.shape
        self.order_M, self.place_Nk, self.slots_E, probs_M = sort_slots(routing_map, probs, self.per_token)
        tokens_ND = hidden_states.reshape(-1, self.shape[-1])
        slots_MD = spread_rows(tokens_ND, self.order_M, self.place_Nk)
        if self.makes_again:
            self.again = partial(spread_rows, tokens_ND.detach(), self.order_M, self.place_Nk)
        return slots_MD, probs_M

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing to send."""
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The slots, how many each expert has, and the probabilities."""
        return hidden_states, self.slots_E, probs

    def get_expert_zero_copy_buffers(self) -> tuple[None, None]:
        """None."""
        return None, None

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """The sum over each token's experts."""
        return collect_rows(hidden_states, self.order_M, self.place_Nk)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """The sum over the ranks' slices."""
        if self.tp_group is not None and self.tp_group.size() > 1:
            torch.distributed.all_reduce(hidden_states, group=self.tp_group)
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """``[T, B, D]``, in the shape in which the tokens came."""
        del self.order_M, self.place_Nk, self.slots_E
        return hidden_states.view(self.shape)


class MoE(MoELayer):
    """Megatron's layer of experts; with a :class:`LocalDispatcher` where all of them are on this rank."""

    token_dispatcher: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        dispatcher, again = self.token_dispatcher, getattr(self.config, "recompute_expert_inputs", False)
        is_local = _is_local(self.config, dispatcher.ep_size, dispatcher.tp_size)
        if is_local:
            local = self.token_dispatcher = LocalDispatcher(self.config.moe_router_topk, makes_again=again)
        if again and not (is_local and isinstance(self.experts, GroupedExperts)):
            raise ValueError(
                "--recompute-expert-inputs needs all experts of a layer on every rank, in grouped GEMMs\n"
                "  why: what was sent from other ranks cannot be made again without sending it again\n"
                "  try: leave it out, or --expert-model-parallel-size 1 without --sequential-experts"
            )
        if again:
            self.experts.input_again = lambda: local.again


def _is_local(config: TransformerConfig, ep_size: int, tp_size: int) -> bool:
    """Whether nothing is sent, nothing dropped, and nothing of Megatron's own takes part in dispatching."""
    return (
        config.moe_token_dispatcher_type == "alltoall"
        and ep_size == tp_size == 1
        and config.moe_expert_capacity_factor is None
        and not config.moe_permute_fusion
        and not config.moe_router_padding_for_quantization
        and not config.moe_shared_expert_overlap
        and not config.overlap_moe_expert_parallel_comm
        and config.cuda_graph_impl == "none"
    )

"""Balance of a mixture's memories: the loss that evens their load, and how even it is.

    loss = coefficient * E * sum_e f_e P_e      f_e share of all choices that fell on memory e, P_e mean probability

It is ``coefficient`` when all memories are chosen alike. One loss per layer, over the tokens of a micro-batch on all
context-parallel ranks (arXiv:2502.13685, section 3.1; the Switch form of arXiv:2101.03961, section 2.2, with all k
choices in f). Its gradient enters as in Megatron's router, through ``MoEAuxLossAutoScaler``.

Letters: B batch, T local tokens, E memories, k memories per token.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from linear_moe.model.config import LinearMoEConfig


class MemoryBalance:
    """The balance of one layer's memories, and a tally of it until :meth:`take`.

    Attributes:
        layer: global index of the layer, from 0.
    """

    def __init__(
        self,
        config: LinearMoEConfig,
        layer: int,
        num_memories: int,
        coefficient: float,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        self.config, self.layer = config, layer
        self.num_memories, self.coefficient = num_memories, coefficient
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.padding_BT: Tensor | None = None  # of the micro-batch that is going forward: not counted
        self._tally: Tensor | None = None

    def attach(self, weight_BTk: Tensor, probs_BTE: Tensor, index_BTk: Tensor) -> Tensor:
        """``weight_BTk`` unchanged; in the backward pass the loss adds its gradient to that of the router."""
        chosen_BTE = torch.zeros_like(probs_BTE).scatter(2, index_BTk, 1.0)
        if self.padding_BT is not None:
            chosen_BTE = chosen_BTE.masked_fill(self.padding_BT[..., None], 0)
            probs_BTE = probs_BTE.masked_fill(self.padding_BT[..., None], 0)
        chosen_E = chosen_BTE.sum((0, 1))
        if self.cp_group.size() > 1:
            dist.all_reduce(chosen_E, group=self.cp_group)
        tokens = chosen_E.sum() / index_BTk.shape[-1]
        share_E = chosen_E / (tokens * index_BTk.shape[-1])
        balance = self.num_memories * (share_E * probs_BTE.sum((0, 1)) / tokens).sum()
        self._count(share_E, balance.detach())
        if self.coefficient == 0:
            return weight_BTk
        # Every tensor-parallel rank computes this loss, and the router's gradients are summed over them.
        loss = self.coefficient * balance / self.tp_group.size()
        if self.config.calculate_per_token_loss:
            loss = loss * tokens  # all gradients are divided by the tokens of the step
        attached: Tensor = MoEAuxLossAutoScaler.apply(weight_BTk, loss)
        return attached

    def _count(self, share_E: Tensor, balance: Tensor) -> None:
        """Add up what a step's micro-batches show: one, the local part of the balance, the shares."""
        # With recomputation of whole layers the first forward pass runs without gradients: count the other one.
        if not torch.is_grad_enabled():
            return
        seen = torch.cat([torch.stack([torch.ones_like(balance), balance]), share_E])
        self._tally = seen if self._tally is None else self._tally + seen

    def take(self) -> Tensor:
        """``[2 + E]`` since the last call: micro-batches, balance and shares, each summed over them."""
        tally = self._tally
        self._tally = None
        if tally is None:
            return torch.zeros(2 + self.num_memories, device=torch.cuda.current_device())
        return tally


def set_loss_scale(config: LinearMoEConfig) -> None:
    """The factor of a micro-batch's auxiliary losses, which Megatron sets only for models with experts."""
    if config.num_moe_experts is not None:
        return
    scale = torch.ones(1, device=torch.cuda.current_device())
    if config.moe_grad_scale_func is not None:
        scale = config.moe_grad_scale_func()
    elif config.grad_scale_func is not None:
        scale = config.grad_scale_func(scale)
    if not config.calculate_per_token_loss:
        scale = scale * config.context_parallel_size / get_num_microbatches()
    MoEAuxLossAutoScaler.set_loss_scale(scale)

"""Group-limited routing as DeepSeek-V2 has it (arXiv:2405.04434, section 2.2.2): a group is worth its best expert.

    chosen groups of a token = the topk_group groups whose best expert scores highest
    chosen experts = the topk best experts of those groups

Megatron ranks a group by the sum of its best topk / topk_group experts, which is DeepSeek-V3's rule; and its balancing
losses count the experts a token would have chosen without groups. Here they count those it goes to.

Letters: M tokens, E experts, G groups, K open groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from linear_moe.model.router import Router


class GroupLimitedRouter(Router):
    """Megatron's router with DeepSeek-V2's choice of groups.

    Raises:
        ValueError: the configuration asks for a router that chooses in a way of its own.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        _refuse_unsupported(config)
        super().__init__(config, *args, **kwargs)
        # Megatron asks whatever stands here for the experts of every token; it is made to replay recorded ones.
        self.router_replay = _BestOfGroup()

    def _apply_aux_loss(
        self, probs: Tensor, scores: Tensor, routing_map: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        return super()._apply_aux_loss(probs, scores, _visited(probs, routing_map), *args, **kwargs)

    def _apply_seq_aux_loss(
        self, probs: Tensor, scores: Tensor, routing_map: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        return super()._apply_seq_aux_loss(probs, scores, _visited(probs, routing_map), *args, **kwargs)

    def _apply_global_aux_loss(
        self, probs: Tensor, scores: Tensor, routing_map: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        return super()._apply_global_aux_loss(probs, scores, _visited(probs, routing_map), *args, **kwargs)


class _BestOfGroup:
    """Chooses experts in the place of ``RouterReplay``."""

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        assert num_groups is not None and group_topk is not None
        return group_limited_topk(scores, topk, num_groups, group_topk)


def group_limited_topk(
    scores_ME: Tensor, topk: int, num_groups: int, group_topk: int
) -> tuple[Tensor, Tensor]:
    """Scores and indices ``[M, topk]`` of each token's experts; in ``scores_ME`` ``[M, E]`` groups are neighbours."""
    groups_MGe = scores_ME.unflatten(-1, (num_groups, -1))
    best_MK = groups_MGe.amax(-1).topk(group_topk, dim=-1, sorted=False).indices
    is_open_MG = torch.zeros_like(groups_MGe[..., 0], dtype=torch.bool).scatter(1, best_MK, True)
    open_ME = groups_MGe.masked_fill(~is_open_MG[..., None], float("-inf")).flatten(1)
    scores, indices = open_ME.topk(topk, dim=-1)
    return scores, indices


def _visited(probs_ME: Tensor, counted_ME: Tensor) -> Tensor:
    """The experts every token goes to; none for a token that ``counted_ME`` leaves out (padding)."""
    return (probs_ME > 0) & counted_ME.any(-1, keepdim=True)


def _refuse_unsupported(config: TransformerConfig) -> None:
    groups, open_groups = config.moe_router_num_groups, config.moe_router_group_topk
    assert groups is not None and open_groups is not None and config.num_moe_experts is not None
    each = config.num_moe_experts // groups
    if open_groups * each < config.moe_router_topk:
        raise ValueError(
            f"{open_groups} groups of {each} experts cannot give a token {config.moe_router_topk} experts\n"
            f"  why: group-limited routing takes all experts of a token from the groups it chose\n"
            f"  try: a larger --moe-router-group-topk, or a smaller --moe-router-topk"
        )
    wrong = {
        "--moe-router-fusion": config.moe_router_fusion,
        "--moe-enable-routing-replay": config.moe_enable_routing_replay,
    }
    for flag, is_set in wrong.items():
        if is_set:
            raise ValueError(
                f"{flag} does not go with group-limited routing\n"
                f"  why: groups are chosen here, since Megatron's choice is not that of DeepSeek-V2\n"
                f"  try: leave {flag} out"
            )

"""Feed-forward blocks of an exported model: dense, or experts that a router chooses.

    y_t = sum over chosen e of p_t[e] W2_e (silu(W1_e x_t) * W3_e x_t)  +  shared(x_t), times sigmoid(w . x_t) if gated

Letters: B rows, T tokens, S = B * T, D hidden, E experts, k experts per token, F width of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from linear_moe.checkpoint.remote.model.configuration_linear_moe import LinearMoeConfig
from linear_moe.kernels.grouped_linear import linear_by_group

# A file has one matrix per expert, the model all in one, which one grouped product reads.
register_checkpoint_conversion_mapping(
    LinearMoeConfig.model_type,
    [
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ],
    overwrite=True,
)


class LinearMoeMLP(nn.Module):
    """A gated unit."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """``[B, T, D]`` to the same."""
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class LinearMoeRouter(nn.Module):
    """Which experts a token visits, and with which weights."""

    def __init__(self, config: LinearMoeConfig) -> None:
        super().__init__()
        assert config.num_experts is not None
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        if config.router_bias:
            self.e_score_correction_bias = nn.Parameter(torch.zeros(config.num_experts))

    def forward(self, x_SD: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices of the chosen experts, ``[S, k]``."""
        config = self.config
        dtype = getattr(torch, config.router_dtype) if config.router_dtype else x_SD.dtype
        dtype = torch.promote_types(dtype, x_SD.dtype)
        logits_SE = F.linear(x_SD.to(dtype), self.weight.to(dtype))
        wide = torch.promote_types(dtype, torch.float32)
        if config.router_score == "sigmoid":
            scores_SE = logits_SE.to(wide).sigmoid()
            bias = self.e_score_correction_bias if config.router_bias else scores_SE.new_zeros(())
            index_Sk = self._choose(scores_SE + bias)
            weight_Sk = scores_SE.gather(1, index_Sk)
            if config.num_experts_per_tok > 1:
                weight_Sk = weight_Sk / (weight_Sk.sum(-1, keepdim=True) + 1e-20)
        elif config.router_softmax_first:
            scores_SE = logits_SE.softmax(-1, dtype=wide)
            index_Sk = self._choose(scores_SE)
            weight_Sk = scores_SE.gather(1, index_Sk)
        else:
            index_Sk = self._choose(logits_SE)
            weight_Sk = logits_SE.gather(1, index_Sk).softmax(-1, dtype=wide)
        if config.router_scale:
            weight_Sk = weight_Sk * config.router_scale
        return weight_Sk.to(dtype), index_Sk

    def _choose(self, scores_SE: Tensor) -> Tensor:
        """The k best, where there are groups those of the groups with the best experts only."""
        config = self.config
        if config.router_groups is not None and config.router_topk_groups is not None:
            groups_SGe = scores_SE.unflatten(1, (config.router_groups, -1))
            best_SK = groups_SGe.amax(-1).topk(config.router_topk_groups, dim=-1).indices
            is_open_SG = torch.zeros_like(groups_SGe[..., 0], dtype=torch.bool).scatter(1, best_SK, True)
            scores_SE = groups_SGe.masked_fill(~is_open_SG[..., None], float("-inf")).flatten(1)
        return scores_SE.topk(config.num_experts_per_tok, dim=-1).indices


class LinearMoeExperts(nn.Module):
    """The experts of a layer, ``gate_up_proj`` ``[E, 2 F, D]`` and ``down_proj`` ``[E, D, F]``."""

    def __init__(self, num_experts: int, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, width))

    def forward(self, x_SD: Tensor, weight_Sk: Tensor, index_Sk: Tensor) -> Tensor:
        """The weighted sum of the chosen experts, ``[S, D]``."""
        order_M = index_Sk.flatten().argsort(stable=True)
        expert_M = index_Sk.flatten()[order_M]
        experts_E = torch.arange(self.down_proj.shape[0], device=x_SD.device)
        ends_E = torch.searchsorted(expert_M, experts_E, right=True).int()
        x_MD = x_SD[order_M // index_Sk.shape[1]]
        gate, up = linear_by_group(x_MD, self.gate_up_proj, ends_E).chunk(2, dim=-1)
        inner_MF = (F.silu(gate) * up * weight_Sk.flatten()[order_M, None]).to(x_SD.dtype)
        out_MD = linear_by_group(inner_MF, self.down_proj, ends_E)
        return out_MD[order_M.argsort()].unflatten(0, index_Sk.shape).sum(1)


class LinearMoeSparseBlock(nn.Module):
    """Router, experts, and the expert that every token visits."""

    def __init__(self, config: LinearMoeConfig) -> None:
        super().__init__()
        assert config.num_experts is not None and config.moe_intermediate_size is not None
        hidden = config.hidden_size
        self.gate = LinearMoeRouter(config)
        self.experts = LinearMoeExperts(config.num_experts, hidden, config.moe_intermediate_size)
        self.shared_expert: LinearMoeMLP | None = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = LinearMoeMLP(hidden, config.shared_expert_intermediate_size)
            if config.shared_expert_gate:
                self.shared_expert_gate = nn.Linear(hidden, 1, bias=False)
        self.is_gated = config.shared_expert_gate

    def forward(self, x_BTD: Tensor) -> Tensor:
        """``[B, T, D]`` to the same."""
        x_SD = x_BTD.flatten(0, 1)
        out_BTD = self.experts(x_SD, *self.gate(x_SD)).view_as(x_BTD)
        if self.shared_expert is None:
            return out_BTD
        shared_BTD = self.shared_expert(x_BTD)
        if self.is_gated:
            shared_BTD = shared_BTD * torch.sigmoid(self.shared_expert_gate(x_BTD))
        return out_BTD + shared_BTD

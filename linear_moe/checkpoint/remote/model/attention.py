"""Softmax layers of an exported model: grouped-query attention, or the latent attention of DeepSeek-V2.

Letters: B rows, T tokens, D hidden, H heads, K channels of queries and keys, V of values, R rotary channels, C rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from linear_moe.checkpoint.remote.model.configuration_linear_moe import LinearMoeConfig

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, ``[B, 1, T, R]``."""


class LinearMoeRMSNorm(nn.Module):
    """RMSNorm over the last dimension, statistics in float32; of a float32 residual stream in the weight's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``."""
        y = F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        return y.to(self.weight.dtype) if x.dtype == torch.float32 else y


def rotation_of(config: LinearMoeConfig, positions_BT: Tensor, dtype: torch.dtype) -> Rotation:
    """Of tokens at these places; the angles in float32."""
    rope = config.rope_parameters or {}
    if rope["rope_type"] == "default":
        channels = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
        power = torch.arange(0, channels, 2, device=positions_BT.device).float() / channels
        frequency, factor = 1.0 / rope["rope_theta"] ** power, 1.0
    else:
        frequency, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, positions_BT.device)
    angle_BTR = (positions_BT[..., None].float() * frequency).repeat(1, 1, 2)[:, None]
    return (angle_BTR.cos() * factor).to(dtype), (angle_BTR.sin() * factor).to(dtype)


def rotate(x_BHTK: Tensor, by: Rotation) -> Tensor:
    """Turn the first R channels, first half against second half."""
    cos, sin = by
    turned, rest = x_BHTK.split([cos.shape[-1], x_BHTK.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1)


class LinearMoeAttention(nn.Module):
    """Grouped-query attention.

    Args:
        config: the model's.
        layer_idx: index of the layer, from 0.
    """

    def __init__(self, config: LinearMoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        heads, key_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.num_key_value_groups = heads // key_heads
        self.scaling = config.attention_multiplier or width**-0.5
        self.is_causal = True
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, heads * width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_heads * width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_heads * width, bias=bias)
        self.o_proj = nn.Linear(heads * width, config.hidden_size, bias=False)
        self.q_norm = LinearMoeRMSNorm(width, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = LinearMoeRMSNorm(width, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        hidden_BTD: Tensor,
        rotation: Rotation,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, T, D]`` to the same, and the weights where the implementation has them."""
        width = self.config.head_dim
        q, k, v = (m(hidden_BTD).unflatten(-1, (-1, width)) for m in (self.q_proj, self.k_proj, self.v_proj))
        q_BHTK = rotate(self.q_norm(q).transpose(1, 2), rotation)
        k_BHTK = rotate(self.k_norm(k).transpose(1, 2), rotation)
        v_BHTV = v.transpose(1, 2)
        if past_key_values is not None:
            k_BHTK, v_BHTV = past_key_values.update(k_BHTK, v_BHTV, self.layer_idx)
        o_BTC, weights = _attend(self, q_BHTK, k_BHTK, v_BHTV, attention_mask)
        return self.o_proj(o_BTC), weights


class LinearMoeLatentAttention(nn.Module):
    """Multi-head latent attention (arXiv:2405.04434, section 2.1); the cache keeps the latent vectors.

    Args:
        config: the model's.
        layer_idx: index of the layer, from 0.
    """

    def __init__(self, config: LinearMoeConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.kv_lora_rank is not None and config.v_head_dim is not None
        assert config.qk_nope_head_dim is not None and config.qk_rope_head_dim is not None
        self.config, self.layer_idx = config, layer_idx
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.widths = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        plain, rotary, values = self.widths
        self.num_key_value_groups = 1
        self.scaling = config.attention_multiplier or (plain + rotary) ** -0.5
        self.is_causal = True
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * (plain + rotary), bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_a_layernorm = self._norm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * (plain + rotary), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.kv_lora_rank + rotary, bias=False)
        self.kv_a_layernorm = self._norm(config.kv_lora_rank)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * (plain + values), bias=False)
        self.o_proj = nn.Linear(heads * values, hidden, bias=False)

    def forward(
        self,
        hidden_BTD: Tensor,
        rotation: Rotation,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, T, D]`` to the same, and the weights where the implementation has them."""
        plain, rotary, values = self.widths
        q_BHTK = self._queries(hidden_BTD).unflatten(-1, (-1, plain + rotary)).transpose(1, 2)
        q_plain, q_rotary = q_BHTK.split([plain, rotary], dim=-1)
        latent = self.kv_a_proj_with_mqa(hidden_BTD)
        latent_BTC, k_rotary = latent.split([latent.shape[-1] - rotary, rotary], dim=-1)
        latent_B1TC = self.kv_a_layernorm(latent_BTC)[:, None]
        k_rotary = rotate(_halves(k_rotary[:, None]), rotation)
        if past_key_values is not None:
            latent_B1TC, k_rotary = past_key_values.update(latent_B1TC, k_rotary, self.layer_idx)
        kv_BHTC = self.kv_b_proj(latent_B1TC[:, 0]).unflatten(-1, (-1, plain + values)).transpose(1, 2)
        k_plain, v_BHTV = kv_BHTC.split([plain, values], dim=-1)
        q_BHTK = torch.cat([q_plain, rotate(_halves(q_rotary), rotation)], dim=-1)
        k_BHTK = torch.cat([k_plain, k_rotary.expand(-1, k_plain.shape[1], -1, -1)], dim=-1)
        o_BTC, weights = _attend(self, q_BHTK, k_BHTK, v_BHTV, attention_mask)
        return self.o_proj(o_BTC), weights

    def _norm(self, size: int) -> nn.Module:
        config = self.config
        return LinearMoeRMSNorm(size, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def _queries(self, hidden_BTD: Tensor) -> Tensor:
        if self.config.q_lora_rank is None:
            return self.q_proj(hidden_BTD)
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_BTD)))


def _halves(x: Tensor) -> Tensor:
    """Rotary channels in pairs to first elements, then second elements."""
    return torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)


def _attend(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """By the implementation that the config names: ``[B, T, H * V]``."""
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, _eager)
    o_BTHV, weights = attend(module, q, k, v, mask, dropout=0.0, scaling=module.scaling)
    return o_BTHV.flatten(2), weights


def _eager(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    logits_BHTT = query @ key.transpose(2, 3) * options["scaling"]
    if attention_mask is not None:
        logits_BHTT = logits_BHTT + attention_mask
    weights_BHTT = logits_BHTT.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights_BHTT @ value).transpose(1, 2).contiguous(), weights_BHTT

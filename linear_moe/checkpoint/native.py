"""From a model of ours to config.json of a class of transformers that computes the same, if there is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linear_moe.checkpoint.hf_config import ALSO_SWITCHES, CLASSES, FIELDS, LATENT_NORM_EPSILON, SWITCHES
from linear_moe.checkpoint.rope import rope_parameters
from linear_moe.model.families import FAMILIES, Family, ModelSize, YarnRope
from linear_moe.model.pattern import SOFTMAX

KINDS = {"qwen3_next": (SOFTMAX, "gated_deltanet"), "mamba2": ("mamba2",)}
"""Layers that a class has, by ``model_type``; all others have softmax layers alone."""


def native_type(family: Family, size: ModelSize) -> str | None:
    """``model_type`` of the class of transformers that computes what a model of ours does, if it fits ``KINDS``."""
    if not size.has_feed_forward:
        return None if size.is_moe else "mamba2"
    if size.has_latent_attention:
        fits = size.is_moe and family.softmax_before_topk and not family.shared_expert_gate
        fits = fits and size.norm_epsilon == LATENT_NORM_EPSILON
        shared, width = size.moe_shared_expert_intermediate_size, size.moe_ffn_hidden_size
        return "deepseek_v2" if fits and shared and width and shared % width == 0 else None
    if isinstance(size.rope_scaling, YarnRope):
        return None
    if size.attention_output_gate:
        return "qwen3_next" if _is_qwen3_next(family, size) else None
    if not size.is_moe:
        if family.add_qkv_bias:
            return "qwen2" if size.rope_scaling is None and _plain_heads(size) else None
        return "llama"
    if size.first_dense_layers or size.moe_router_topk_scaling_factor or size.moe_router_num_groups:
        return None
    if size.rope_scaling is not None or not _plain_heads(size):
        return None
    if size.moe_shared_expert_intermediate_size is not None:
        return "qwen2_moe" if family.add_qkv_bias and family.shared_expert_gate else None
    is_mixtral = not family.add_qkv_bias and not family.softmax_before_topk
    return "mixtral" if is_mixtral and size.moe_ffn_hidden_size == size.ffn_hidden_size else None


def _is_qwen3_next(family: Family, size: ModelSize) -> bool:
    shared = size.moe_shared_expert_intermediate_size is not None and family.shared_expert_gate
    routed = not (
        size.first_dense_layers or size.moe_router_topk_scaling_factor or size.moe_router_num_groups
    )
    norms = family.qk_norm and family.zero_centered_norms
    rotary = size.rope_scaling is None and family.rotary_percent == FAMILIES["qwen3_next"].rotary_percent
    return size.is_moe and shared and routed and norms and rotary and not family.add_qkv_bias


def _plain_heads(size: ModelSize) -> bool:
    return size.kv_channels * size.num_attention_heads == size.hidden_size


def native_config(
    kind: str, family: Family, size: ModelSize, *, dtype: str, layers: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """config.json of a model of ours, for the class that :func:`native_type` names; ``layers``: the fields of
    its mixers (Qwen3-Next, Mamba2)."""
    config: dict[str, Any] = {"architectures": [CLASSES[kind]], "model_type": kind, "dtype": dtype}
    config |= {theirs: getattr(size, ours) for theirs, ours in FIELDS[kind].items()}
    config |= {name: values[0] for name, values in (SWITCHES[kind] | ALSO_SWITCHES).items()}
    # the classes have numbers for them, which would be those of some other tokenizer
    config |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if kind in ("qwen2_moe", "qwen3_next"):
        config["norm_topk_prob"] = not family.softmax_before_topk
    if kind == "mixtral":
        config |= {"sliding_window": None, "head_dim": size.kv_channels}
    if kind == "deepseek_v2":
        assert size.moe_shared_expert_intermediate_size and size.moe_ffn_hidden_size
        config["routed_scaling_factor"] = size.moe_router_topk_scaling_factor or 1.0
        config["n_shared_experts"] = size.moe_shared_expert_intermediate_size // size.moe_ffn_hidden_size
        config["topk_method"] = "greedy" if size.moe_router_num_groups is None else "group_limited_greedy"
        config |= {"n_group": size.moe_router_num_groups, "topk_group": size.moe_router_group_topk}
        config["head_dim"] = size.qk_pos_emb_head_dim
    if kind == "mamba2":
        # of float32 all is float32
        return config | {"residual_in_fp32": size.fp32_residual or dtype == "float32"} | dict(layers or {})
    config["rope_parameters"] = rope_parameters(size)
    if kind == "qwen3_next":
        config["rope_parameters"]["partial_rotary_factor"] = family.rotary_percent
        config |= layers or {}
    return config

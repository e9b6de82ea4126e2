"""From the config that Megatron builds a model from to the ``config.json`` of an exported folder."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch.nn import functional as F

from linear_moe.model.builder import LinearMoEModelConfig
from linear_moe.model.config import LinearMoEConfig, mixer_config
from linear_moe.model.pattern import SOFTMAX
from linear_moe.model.specs import moe_layers

AUTO_MAP = {
    "AutoConfig": "configuration_linear_moe.LinearMoeConfig",
    "AutoModel": "modeling_linear_moe.LinearMoeModel",
    "AutoModelForCausalLM": "modeling_linear_moe.LinearMoeForCausalLM",
}

PLAIN: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "add_bias_linear": (False,),
    "gated_linear_unit": (True,),
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (0.0,),
    "layernorm_zero_centered_gamma": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "attention_output_gate": (False,),
    "qk_l2_norm": (False,),
    "softmax_type": ("vanilla",),
    "window_size": (None,),
    "rotary_interleaved": (False,),
    "no_rope_freq": (None,),
    "moe_latent_size": (None,),
    "moe_apply_probs_on_input": (False,),
    "moe_router_score_function": ("softmax", "sigmoid"),
    "use_mup": (False,),
}
"""Options of Megatron that the exported model knows only with these values."""

ROUTING = ("sinkhorn", "quantile_balancing")
"""Ways to balance experts that choose them, too; all others only add a loss."""


def hf_config(model: LinearMoEModelConfig, *, vocab_size: int, dtype: str) -> dict[str, Any]:
    """The whole ``config.json``.

    Args:
        model: what the model was built from, by :func:`~linear_moe.inference.rebuild.single_process_arguments`.
        vocab_size: rows of the exported embedding.
        dtype: of the exported weights, such as ``bfloat16``.

    Raises:
        ValueError: an option that the exported model does not have.
    """
    _refuse(model)
    return _described(model, vocab_size, dtype)


def facts(model: LinearMoEModelConfig, *, vocab_size: int, dtype: str) -> dict[str, Any]:
    """The same of any model, with the options that the exported code does not know: to compare two models."""
    config = model.transformer
    names = ("position_embedding_type", "seq_len_interpolation_factor")
    return {
        **_described(model, vocab_size, dtype),
        **{name: getattr(config, name, values[0]) for name, values in PLAIN.items()},
        **{name: getattr(model, name) for name in names},
        "activation_func": config.activation_func,
        "routing": _routing(config),
    }


def _routing(config: LinearMoEConfig) -> list[str]:
    """What balances experts otherwise than by a loss."""
    given = getattr(config, "moe_router_load_balancing_type", None) or ()
    return [name for name in ([given] if isinstance(given, str) else given) if name in ROUTING]


def _described(model: LinearMoEModelConfig, vocab_size: int, dtype: str) -> dict[str, Any]:
    config = model.transformer
    kinds = list(config.layer_kinds)
    return {
        "architectures": ["LinearMoeForCausalLM"],
        "auto_map": dict(AUTO_MAP),
        "model_type": "linear_moe",
        "dtype": dtype,
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "residual_in_fp32": config.fp32_residual_connection,
        "num_hidden_layers": config.num_layers,
        "layer_kinds": kinds,
        "mixers": {kind: _mixer(kind, config) for kind in dict.fromkeys(kinds) if kind != SOFTMAX},
        "rms_norm_eps": config.layernorm_epsilon,
        "max_position_embeddings": model.seq_length,
        "initializer_range": config.init_method_std,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "use_cache": True,
        **_attention(model),
        **_experts(config),
    }


def _mixer(kind: str, config: LinearMoEConfig) -> dict[str, Any]:
    """Every option, so that a later default changes nothing."""
    return dataclasses.asdict(mixer_config(kind, config))


def _attention(model: LinearMoEModelConfig) -> dict[str, Any]:
    config = model.transformer
    found = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups or config.num_attention_heads,
        "head_dim": config.kv_channels,
        "attention_bias": config.add_qkv_bias,
        "qk_norm": bool(config.qk_layernorm),
    }
    if config.multi_latent_attention:
        return found | _latent_attention(config)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(model.rotary_base)}
    if model.rotary_percent != 1.0:
        rope["partial_rotary_factor"] = model.rotary_percent
    if model.rope_scaling:  # constants of Megatron's RotaryEmbedding
        rope |= {"rope_type": "llama3", "factor": float(model.rope_scaling_factor)}
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return found | {"rope_parameters": rope, "attention_multiplier": config.softmax_scale}


def _latent_attention(config: Any) -> dict[str, Any]:
    """Sizes and YaRN of DeepSeek-V2; scales in numbers, for the many ways to write them."""
    factor = float(config.rotary_scaling_factor)
    scale = _yarn_scale(factor, config.mscale_all_dim)
    width = config.qk_head_dim + config.qk_pos_emb_head_dim
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(config.rotary_base)}
    if config.rope_type == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": config.original_max_position_embeddings,
            "beta_fast": float(config.beta_fast),
            "beta_slow": float(config.beta_slow),
            "attention_factor": _yarn_scale(factor, config.mscale) / scale,
        }
    return {
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.qk_pos_emb_head_dim,
        "attention_bias": False,
        "qk_norm": bool(config.qk_layernorm),
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_head_dim,
        "qk_rope_head_dim": config.qk_pos_emb_head_dim,
        "v_head_dim": config.v_head_dim,
        "rope_parameters": rope,
        "attention_multiplier": scale * scale / math.sqrt(width),
    }


def _yarn_scale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _experts(config: LinearMoEConfig) -> dict[str, Any]:
    if config.num_moe_experts is None:
        return {"num_experts": None}
    return {
        "num_experts": config.num_moe_experts,
        "num_experts_per_tok": config.moe_router_topk,
        "moe_intermediate_size": config.moe_ffn_hidden_size,
        "moe_layers": moe_layers(config),
        "shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
        "shared_expert_gate": bool(config.moe_shared_expert_gate),
        "router_score": config.moe_router_score_function,
        "router_softmax_first": config.moe_router_pre_softmax,
        "router_scale": config.moe_router_topk_scaling_factor,
        "router_groups": config.moe_router_num_groups if config.moe_router_group_topk else None,
        "router_topk_groups": config.moe_router_group_topk,
        "router_bias": config.moe_router_enable_expert_bias,
        "router_dtype": {"fp32": "float32", "fp64": "float64"}.get(config.moe_router_dtype or ""),
    }


def _refuse(model: LinearMoEModelConfig) -> None:
    """One error for everything that the exported model cannot express."""
    config = model.transformer
    given = {name: getattr(config, name, values[0]) for name, values in PLAIN.items()}
    wrong = [f"{name}={value!r}" for name, value in given.items() if value not in PLAIN[name]]
    wrong += [f"moe_router_load_balancing_type={name!r}" for name in _routing(config)]
    if config.activation_func is not F.silu:
        wrong.append(f"activation_func={getattr(config.activation_func, '__name__', config.activation_func)}")
    has_softmax = SOFTMAX in config.layer_kinds
    if has_softmax and not config.multi_latent_attention and model.position_embedding_type != "rope":
        wrong.append(f"position_embedding_type={model.position_embedding_type!r}")
    if model.position_embedding_type == "learned_absolute":
        wrong.append("position_embedding_type='learned_absolute'")
    if model.seq_len_interpolation_factor is not None:
        wrong.append(f"seq_len_interpolation_factor={model.seq_len_interpolation_factor}")
    if wrong:
        raise ValueError(
            f"the model cannot be exported with {', '.join(dict.fromkeys(wrong))}\n"
            f"  why: the exported code knows what the families have: RMSNorm, SwiGLU without biases, rotary positions\n"
            f"  try: python tools/generate.py for this run, which needs no export"
        )

"""Tiny random models of transformers, one of every family and variant that can be imported."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

VOCAB = 250  # not a multiple of 128: the padding of the vocabulary is tested everywhere

_BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_QWEN_MOE = _BASE | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "num_experts": 4}
_QWEN3_NEXT = _QWEN_MOE | {
    "num_hidden_layers": 4,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
}
_DEEPSEEK = _BASE | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
_MAMBA2 = {
    "hidden_size": 64,
    "num_heads": 8,
    "head_dim": 16,
    "state_size": 16,
    "n_groups": 2,
    "num_hidden_layers": 2,
    "vocab_size": VOCAB,
    "chunk_size": 16,
    "eos_token_id": None,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 4096}
_YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 0.9}
_LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
_LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", _BASE),
    "qwen2-tied": ("Qwen2", _BASE | {"tie_word_embeddings": True}),
    "qwen2_moe": ("Qwen2Moe", _QWEN_MOE | {"num_experts_per_tok": 2}),
    "qwen2_moe-renormalised": ("Qwen2Moe", _QWEN_MOE | {"num_experts_per_tok": 2, "norm_topk_prob": True}),
    "qwen3_next": ("Qwen3Next", _QWEN3_NEXT | {"linear_num_value_heads": 8}),
    "qwen3_next-equal": (
        "Qwen3Next",
        _QWEN3_NEXT
        | {"num_hidden_layers": 2, "layer_types": ["full_attention", "linear_attention"]}
        | {"linear_conv_kernel_dim": 3},
    ),
    "llama": ("Llama", _BASE | {"rope_parameters": _LLAMA3_ROPE, "head_dim": 24}),
    "mixtral": (
        "Mixtral",
        _BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "deepseek_v2": (
        "DeepseekV2",
        _DEEPSEEK
        | {"q_lora_rank": 24, "routed_scaling_factor": 2.5, "rope_parameters": _YARN}
        | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    "mamba2": ("Mamba2", _MAMBA2),
    "mamba2-tied": (
        "Mamba2",
        _MAMBA2
        | {"n_groups": 1, "num_heads": 9, "head_dim": 64, "hidden_size": 192, "expand": 3, "conv_kernel": 2}
        | {"tie_word_embeddings": True, "use_conv_bias": False, "residual_in_fp32": False, "chunk_size": 256}
        | {"time_step_limit": (0.01, 0.5)},
    ),
    "deepseek_v2-lite": ("DeepseekV2", _DEEPSEEK | {"q_lora_rank": None, "topk_method": "greedy"}),
}


def save_hf(folder: Path | str, name: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> None:
    """Write a tiny model, random but for its norms, in several files."""
    import transformers

    class_name, config = MODELS[name]
    torch.manual_seed(0)
    config_of, model_of = (getattr(transformers, class_name + end) for end in ("Config", "ForCausalLM"))
    model = model_of(config_of(**(config | changes)))
    for key, parameter in model.named_parameters():
        scale = 0.5 if "layernorm" in key or key.endswith("norm.weight") else 0.05
        parameter.data += scale * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder, max_shard_size="60KB")


@contextmanager
def on_cpu() -> Iterator[None]:
    """Without the kernels that transformers takes from flash-linear-attention when that is installed."""
    from transformers.models.mamba2 import modeling_mamba2
    from transformers.models.qwen3_next import modeling_qwen3_next

    with ExitStack() as stack:
        for modeling in (modeling_mamba2, modeling_qwen3_next):
            for name, function in vars(modeling).items():
                here = getattr(function, "__module__", None) == modeling.__name__
                if here and hasattr(function, "__wrapped__"):
                    stack.enter_context(mock.patch.object(modeling, name, function.__wrapped__))
        yield


def hf_logits(folder: Path | str, tokens: list[list[int]], **options: Any) -> torch.Tensor:
    """``[B, T, V]`` of a folder as transformers reads it."""
    model = hf_model(folder, attn_implementation="eager", **options)
    with torch.no_grad(), on_cpu():
        return model(torch.tensor(tokens)).logits


def hf_model(folder: Path | str, **options: Any) -> Any:
    """A folder in float32, by the class that its config names.

    Not by ``AutoModelForCausalLM`` where transformers has it: flash-linear-attention, once imported, puts a Mamba2 of
    its own there, which needs a GPU.
    """
    import transformers

    name = json.loads((Path(folder) / "config.json").read_text())["architectures"][0]
    load = getattr(transformers, name, transformers.AutoModelForCausalLM).from_pretrained
    return load(folder, dtype=torch.float32, **options).eval()


def some_tokens(batch: int = 2, length: int = 40) -> list[list[int]]:
    """Random tokens, the same every time."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, VOCAB, (batch, length), generator=generator).tolist()

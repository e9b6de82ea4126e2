"""Published config.json files are understood: old and new spellings, and which named size of ours each one is."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest

from linear_moe.checkpoint import mamba2
from linear_moe.checkpoint.hf_config import describe
from linear_moe.checkpoint.native import native_config, native_type
from linear_moe.lsm.mamba2 import Mamba2

_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
_DEEPSEEK = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
_QWEN3_NEXT = {
    "architectures": ["Qwen3NextForCausalLM"],
    "decoder_sparse_step": 1,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
_MAMBA2 = {
    "architectures": ["Mamba2ForCausalLM"],
    "bos_token_id": 0,
    "chunk_size": 256,
    "conv_kernel": 4,
    "eos_token_id": 0,
    "expand": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 768,
    "initializer_range": 0.1,
    "layer_norm_epsilon": 1e-05,
    "model_type": "mamba2",
    "n_groups": 1,
    "num_heads": 24,
    "num_hidden_layers": 24,
    "pad_token_id": 0,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "rms_norm": True,
    "state_size": 128,
    "tie_word_embeddings": True,
    "time_step_floor": 0.0001,
    "time_step_limit": [0.0, math.inf],
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": 48,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "vocab_size": 50288,
}
_INFINITY = {"__float__": "Infinity"}
PUBLISHED = {
    "Qwen2-7B": (_QWEN2, "7B"),
    "Qwen2-57B-A14B": (
        _QWEN2
        | {"model_type": "qwen2_moe", "vocab_size": 151936, "sliding_window": 65536, "decoder_sparse_step": 1}
        | {
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2560,
            "norm_topk_prob": False,
        }
        | {"shared_expert_intermediate_size": 20480, "output_router_logits": False},
        "A14B",
    ),
    "Qwen3-Next-80B-A3B": (_QWEN3_NEXT, "80B-A3B"),
    "Llama-3.1-8B": (_LLAMA, "8B"),
    "Llama-3.2-1B": (
        _LLAMA
        | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
        | {"rope_scaling": _LLAMA["rope_scaling"] | {"factor": 32.0}, "tie_word_embeddings": True},
        "1B",
    ),
    "Llama-3-8B": (_LLAMA | {"rope_scaling": None, "max_position_embeddings": 8192}, "custom"),
    "Mamba2-130m": (_MAMBA2, "130M"),
    "Mamba2-2.7b": (
        _MAMBA2
        | {
            "hidden_size": 2560,
            "num_heads": 80,
            "num_hidden_layers": 64,
            "time_step_limit": [0.0, _INFINITY],
        },
        "2.7B",
    ),
    "Mamba-Codestral-7B-v0.1": (
        _MAMBA2
        | {"hidden_size": 4096, "num_heads": 128, "num_hidden_layers": 64, "n_groups": 8}
        | {"norm_before_gate": True, "tie_word_embeddings": False, "vocab_size": 32768},
        "custom",
    ),
    "Mixtral-8x7B-v0.1": (
        {
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "model_type": "mixtral",
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 32000,
        },
        "8x7B",
    ),
    "DeepSeek-V2-Lite": (_DEEPSEEK, "A2.4B"),
    "DeepSeek-V2": (
        _DEEPSEEK
        | {
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "n_routed_experts": 160,
        }
        | {
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "num_hidden_layers": 60,
            "q_lora_rank": 1536,
        }
        | {
            "n_group": 8,
            "topk_group": 3,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
        },
        "A21B",
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_our_named_sizes(name):
    config, size_name = PUBLISHED[name]
    described = describe(config)
    assert described.size_name == size_name and described.dtype == "bfloat16"
    assert described.size.vocab_size == config["vocab_size"]
    if size_name != "custom":
        named = described.family.sizes[size_name]
        assert named.vocab_size + named.extra_vocab_size == config["vocab_size"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_we_write_is_what_we_read(name):
    described = describe(PUBLISHED[name][0])
    kind = native_type(described.family, described.size)
    assert kind == described.model_type
    layers = None
    if kind == "mamba2":
        options = dict(pairwise(described.mixer_arguments))
        groups, heads = int(options["--mamba2-num-groups"]), described.size.hidden_size // 32
        width = described.size.hidden_size
        layers = mamba2.fields_of(
            Mamba2.Config(hidden_size=width, num_heads=heads, head_dim=64, num_groups=groups)
        )
    again = native_config(kind, described.family, described.size, dtype="bfloat16", layers=layers)
    assert describe(json.loads(json.dumps(again))) == replace(described, warnings=())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "type yarn"),
        ({"rope_scaling": _LLAMA["rope_scaling"] | {"low_freq_factor": 2.0}}, "'low_freq_factor': 2.0"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"num_hidden_layers": None, "model_type": "gemma"}, "'gemma'"),
    ],
)
def test_what_our_layers_do_not_compute(changes, message):
    with pytest.raises(ValueError, match=message):
        describe(_LLAMA | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"linear_num_key_heads": 8}, "linear_num_key_heads = 8 and num_attention_heads = 16"),
        ({"linear_num_value_heads": 24}, "linear_num_value_heads = 24"),
        ({"partial_rotary_factor": 0.5}, "a part 0.5 of the channels"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        ({"layer_types": ["linear_attention"] * 47 + ["sliding_attention"]}, "layer_types sliding_attention"),
        ({"layer_types": ["linear_attention"]}, "layer_types 1 for 48 layers"),
    ],
)
def test_what_our_layers_do_not_compute_of_qwen3_next(changes, message):
    with pytest.raises(ValueError, match=message):
        describe(_QWEN3_NEXT | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bias": True}, "use_bias = True"),
        ({"rms_norm": False}, "rms_norm = False"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"num_heads": 25}, "expand = 2"),
        ({"expand": 1.5, "num_heads": 18}, "expand = 1.5"),
        ({"n_groups": 5}, "n_groups = 5"),
        ({"conv_kernel": 1}, "conv_kernel = 1"),
        ({"state_size": 512}, "state_size = 512"),
        ({"head_dim": 512, "num_heads": 3}, "head_dim = 512"),
        ({"time_step_limit": [0.1, 0.1]}, r"time_step_limit = \[0.1, 0.1\]"),
        ({"time_step_limit": [-1.0, _INFINITY]}, r"time_step_limit = \[-1.0, "),
        ({"time_step_limit": 0.1}, "time_step_limit = 0.1"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype float8_e4m3fn"),
    ],
)
def test_what_our_layers_do_not_compute_of_mamba2(changes, message):
    with pytest.raises(ValueError, match=rf"config.json (has|names) {message}(.|\n)*  why: .*\n  try: "):
        describe(_MAMBA2 | changes)


def test_mamba2_means_its_classes_defaults():
    """An absent field, and what transformers does not read."""
    absent = ("n_groups", "time_step_limit", "residual_in_fp32", "use_conv_bias", "rms_norm")
    described = describe({name: value for name, value in _MAMBA2.items() if name not in absent})
    options = dict(pairwise(described.mixer_arguments))
    assert options["--mamba2-num-groups"] == "8" and options["--mamba2-conv-bias"] == "true"
    assert "--mamba2-dt-limit-max" not in options and described.size.fp32_residual
    assert described.size.ffn_hidden_size == 0 and set(described.kinds) == {"mamba2"}
    limited = dict(pairwise(describe(_MAMBA2 | {"time_step_limit": [0.01, 0.5]}).mixer_arguments))
    assert (limited["--mamba2-dt-limit-min"], limited["--mamba2-dt-limit-max"]) == ("0.01", "0.5")
    (warning,) = describe(_MAMBA2 | {"norm_before_gate": True}).warnings
    assert "norm_before_gate = true is ignored" in warning and not described.warnings


def test_norms_of_latent_attention_have_an_epsilon_of_their_own():
    """Transformers' class adds 1e-6 there whatever the config says: neither read nor written with another number."""
    with pytest.raises(ValueError, match=r"has rms_norm_eps = 1e-05\n  why: .*\n  try: "):
        describe(_DEEPSEEK | {"rms_norm_eps": 1e-5})
    described = describe(_DEEPSEEK)
    assert native_type(described.family, replace(described.size, norm_epsilon=1e-5)) is None


def test_windows_and_lacking_fields():
    mixtral = PUBLISHED["Mixtral-8x7B-v0.1"][0]
    with pytest.raises(ValueError, match="sliding window of 4096"):
        describe(mixtral | {"sliding_window": 4096})
    del (cut := dict(mixtral))["num_local_experts"]
    with pytest.raises(ValueError, match="lacks num_local_experts"):
        describe(cut)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "3584"}, "hidden_size = '3584'"),
        ({"num_hidden_layers": 28.0, "vocab_size": 0}, "num_hidden_layers = 28.0, vocab_size = 0"),
        ({"intermediate_size": None}, "intermediate_size = None"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3 of num_attention_heads = 28"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'"),
    ],
)
def test_values_that_are_none(changes, message):
    with pytest.raises(ValueError, match=rf"config.json has {message}\n  why: .*\n  try: "):
        describe(_QWEN2 | changes)


def test_values_of_another_kind():
    experts = PUBLISHED["Mixtral-8x7B-v0.1"][0] | {"num_experts_per_tok": 9}
    with pytest.raises(ValueError, match="num_experts_per_tok = 9 of num_local_experts = 8"):
        describe(experts)
    with pytest.raises(ValueError, match=r"cannot be understood: TypeError: .*\n  why: .*\n  try: "):
        describe(_QWEN3_NEXT | {"layer_types": 3})

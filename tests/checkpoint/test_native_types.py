"""Which class of transformers computes what a model of ours does: none, where a single thing differs."""

from dataclasses import replace
from typing import Any

import pytest

from linear_moe.checkpoint.native import native_config, native_type
from linear_moe.model.families import FAMILIES, Llama3Rope, ModelSize, YarnRope

LLAMA3 = {"rope_scaling": Llama3Rope(factor=8.0)}
YARN = {"rope_scaling": YarnRope(factor=40.0, mscale=1.0, mscale_all_dim=1.0)}
ROUTED: list[dict[str, Any]] = [
    {"first_dense_layers": 1},
    {"moe_router_topk_scaling_factor": 2.0},
    {"moe_router_num_groups": 2},
]
DENSE = {"num_experts": None}
BIASED, UNBIASED = {"add_qkv_bias": True}, {"add_qkv_bias": False}

MODELS: dict[str, tuple[str, str, list[dict[str, Any]]]] = {
    "qwen2": ("qwen2", "7B", [LLAMA3, YARN, {"kv_channels": 64}]),
    "qwen2_moe": (
        "qwen2",
        "A14B",
        [
            *ROUTED,
            LLAMA3,
            YARN,
            {"kv_channels": 64},
            UNBIASED,
            {"shared_expert_gate": False},
            {"moe_shared_expert_intermediate_size": None},
        ],
    ),
    "llama": ("llama3", "8B", [YARN, {"num_experts": 8}]),
    "mixtral": (
        "mixtral",
        "8x7B",
        [
            *ROUTED,
            LLAMA3,
            {"kv_channels": 64},
            BIASED,
            {"softmax_before_topk": True},
            {"moe_ffn_hidden_size": 64},
            {"moe_shared_expert_intermediate_size": 64},
        ],
    ),
    "deepseek_v2": (
        "deepseek_v2",
        "A2.4B",
        [DENSE, {"softmax_before_topk": False}, {"shared_expert_gate": True}, {"norm_epsilon": 1e-5}]
        + [{"moe_shared_expert_intermediate_size": size} for size in (None, 100)]
        + [{"moe_ffn_hidden_size": None}],
    ),
    "qwen3_next": (
        "qwen3_next",
        "80B-A3B",
        [
            *ROUTED,
            DENSE,
            LLAMA3,
            YARN,
            BIASED,
            {"qk_norm": False},
            {"zero_centered_norms": False},
            {"rotary_percent": 1.0},
            {"shared_expert_gate": False},
            {"attention_output_gate": False},
            {"moe_shared_expert_intermediate_size": None},
        ],
    ),
    "mamba2": ("mamba2", "130M", [{"num_experts": 8}]),
}


@pytest.mark.parametrize(("kind", "model"), MODELS.items(), ids=MODELS)
def test_a_class_fits_exactly_or_not_at_all(kind: str, model: tuple[str, str, list[dict[str, Any]]]):
    name, size_name, differences = model
    family, size = FAMILIES[name], FAMILIES[name].sizes[size_name]
    assert native_type(family, size) == kind
    for changes in differences:
        of_size = {field: value for field, value in changes.items() if field in ModelSize.__annotations__}
        of_family = {field: value for field, value in changes.items() if field not in of_size}
        assert native_type(replace(family, **of_family), replace(size, **of_size)) is None, changes


def test_fields_whose_defaults_would_be_another_model():
    """An absent field means what the class of transformers takes it for."""

    def config(
        kind: str, dtype: str = "bfloat16", size: dict[str, Any] | None = None, **switches: Any
    ) -> Any:
        name, size_name, _ = MODELS[kind]
        family = replace(FAMILIES[name], **switches)
        return native_config(kind, family, replace(family.sizes[size_name], **(size or {})), dtype=dtype)

    for kind in ("qwen2_moe", "qwen3_next"):
        for before in (False, True):
            assert config(kind, softmax_before_topk=before)["norm_topk_prob"] is not before
    mixtral = config("mixtral", size={"kv_channels": 64})
    assert mixtral["sliding_window"] is None and mixtral["head_dim"] == 64
    assert config("deepseek_v2")["head_dim"] == FAMILIES["deepseek_v2"].sizes["A2.4B"].qk_pos_emb_head_dim
    for kind in ("llama", "qwen2"):
        assert not config(kind).keys() & {"norm_topk_prob", "sliding_window"}
    for stream in (False, True):
        kept = config("mamba2", size={"fp32_residual": stream})
        assert kept["residual_in_fp32"] is stream
        assert config("mamba2", "float32", {"fp32_residual": stream})["residual_in_fp32"] is True

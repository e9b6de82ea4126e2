"""A config.json that leaves out a field, or has it at the edge of what fits, means what transformers takes it for."""

import json
from typing import Any

import pytest
import transformers

from linear_moe.checkpoint.hf_config import describe
from tests.checkpoint.test_import_configs import PUBLISHED


def published(name: str, *without: str, **changes: Any) -> dict[str, Any]:
    config = json.loads(json.dumps(PUBLISHED[name][0]))
    return {field: value for field, value in config.items() if field not in without} | changes


def of_type(kind: str) -> str:
    return next(name for name, (config, *_) in PUBLISHED.items() if config["model_type"] == kind)


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_next"])
def test_whether_the_weights_of_chosen_experts_sum_to_one(kind: str):
    """Softmax before the choice, unless they are renormalised; the two types differ in what a file without it means."""
    absent = transformers.AutoConfig.for_model(kind).norm_topk_prob
    for config, renormalised in (
        (published(of_type(kind), "norm_topk_prob"), absent),
        (published(of_type(kind), norm_topk_prob=True), True),
        (published(of_type(kind), norm_topk_prob=False), False),
    ):
        assert describe(config).family.softmax_before_topk is not renormalised


OTHERWISE: dict[str, dict[str, Any]] = {
    "qwen2": {"hidden_act": "gelu", "use_sliding_window": True},
    "qwen2_moe": {"qkv_bias": False, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "qwen3_next": {"attention_bias": True, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "deepseek_v2": {"attention_bias": True, "mlp_bias": True, "moe_layer_freq": 2, "norm_topk_prob": True}
    | {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "mamba2": {"use_bias": True, "rms_norm": False, "hidden_act": "gelu"},
}
"""Values with which models of a type have other tensors, or compute something else of the same ones."""


@pytest.mark.parametrize(("kind", "field"), [(kind, name) for kind in OTHERWISE for name in OTHERWISE[kind]])
def test_a_model_that_computes_something_else_is_not_taken_for_ours(kind: str, field: str):
    name, value = of_type(kind), OTHERWISE[kind][field]
    with pytest.raises(
        ValueError, match=rf"config.json has {field} = .*\n  why: our layers compute .* only\n"
    ):
        describe(published(name, **{field: value}))
    assert describe(published(name, field)) == describe(published(name)), "absent it is what ours compute"
    assert describe(published(name, **{field: None})) == describe(published(name))


def test_layers_of_qwen3_next_without_a_list():
    """Every fourth is softmax, or another one."""
    name = of_type("qwen3_next")
    for changes in ({}, {"full_attention_interval": 3}, {"full_attention_interval": 2}):
        config = published(name, "layer_types", "full_attention_interval", **changes)
        given = {**config, "num_hidden_layers": 12}
        theirs = transformers.AutoConfig.for_model(**given).layer_types
        names = {"linear_attention": "gated_deltanet", "full_attention": "softmax"}
        assert describe(given).kinds == tuple(names[kind] for kind in theirs)


def test_a_window_as_long_as_the_sequences_is_none():
    name = of_type("mixtral")
    longest = published(name)["max_position_embeddings"]
    assert describe(published(name, sliding_window=longest)).size.num_layers
    with pytest.raises(ValueError, match=f"has a sliding window of {longest - 1} tokens\n"):
        describe(published(name, sliding_window=longest - 1))
    unused = published(of_type("qwen2_moe"), sliding_window=16, use_sliding_window=False)
    assert describe(unused).size.num_layers


@pytest.mark.parametrize("value", [0, -1e-6, "1e-6", float("nan")])
def test_an_epsilon_is_a_positive_number(value: Any):
    with pytest.raises(ValueError, match=r"config.json has rms_norm_eps = .*\n  why: "):
        describe(published(of_type("qwen2"), rms_norm_eps=value))


def test_a_token_may_visit_every_expert_and_no_more():
    name = of_type("mixtral")
    assert describe(published(name, num_experts_per_tok=8)).size.moe_router_topk == 8
    with pytest.raises(ValueError, match="num_experts_per_tok = 9 of num_local_experts = 8"):
        describe(published(name, num_experts_per_tok=9))


def test_spellings_of_a_dtype():
    """The newer field wins; without one the weights are what torch makes them."""
    name = of_type("qwen2")
    for changes, dtype in (
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"torch_dtype": "float16", "dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": None}, "float32"),
        ({}, "float32"),
    ):
        assert describe(published(name, "torch_dtype", **changes)).dtype == dtype
    with pytest.raises(ValueError, match=r"config.json names dtype float64\n  why: "):
        describe(published(name, torch_dtype="float64"))

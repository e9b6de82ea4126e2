"""What the mixers of a model ask of Megatron, from the kinds of its layers."""

import pytest
import torch

from linear_moe.lsm.gla import GatedLinearAttention
from linear_moe.lsm.tables import LAYOUTS
from linear_moe.model.config import LinearMoEConfig, mixer_config
from linear_moe.model.mixer_options import check_supported


def config(kinds: list[str], **changes) -> LinearMoEConfig:
    given = {"hidden_size": 16, "num_attention_heads": 2, "kv_channels": 8, "ffn_hidden_size": 32}
    given |= {"mixer_options": {"hgrn2": {"expand_ratio": 8}, "mom_hgrn2": {"expand_ratio": 8}}}
    return LinearMoEConfig(**(given | {"num_layers": len(kinds), "layer_kinds": kinds} | changes))


@pytest.mark.parametrize(
    "kinds, shares",
    [(["hgrn2", "gla"], True), (["gla", "mom_hgrn2"], True), (["gla", "rwkv7", "softmax"], False)],
)
def test_tables_of_the_model_are_summed_over_stages(kinds, shares):
    assert config(kinds).has_cond_embedder == shares


@pytest.mark.parametrize(
    "kinds, stages, varies",
    [
        (["rwkv7", "rwkv7"], 2, True),
        (["rwkv7", "rwkv7"], 1, False),
        (["rwkv7", "gla"], 2, False),
        (["rwkv6", "rwkv6"], 2, False),
    ],
)
def test_messages_between_stages_vary_where_a_value_rides_with_them(kinds, stages, varies):
    changes = {"pipeline_model_parallel_size": stages, "pipeline_dtype": torch.float32}
    assert config(kinds, **changes).variable_seq_lengths == varies


def test_layers_of_a_kind_are_counted():
    found = config(["gla", "rwkv7", "gla", "softmax"])
    assert [mixer_config(kind, found).layers_of_kind for kind in ("gla", "rwkv7", "deltanet")] == [2, 1, 1]


def test_a_value_handed_on_is_lost_by_recomputing_layers():
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    with pytest.raises(ValueError, match=r"^rwkv7 .* full recomputation"):
        config(["rwkv7", "rwkv7"], **full)
    config(["rwkv7", "gla"], **full)
    config(["rwkv7", "rwkv7"], recompute_granularity="selective")
    config(["rwkv7", "rwkv7"])


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
STAGES = {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32}
IN_CONFIG = {
    "TP": [{"tensor_model_parallel_size": 2}],
    "SP": [{"tensor_model_parallel_size": 2, "sequence_parallel": True}],
    "CP": [{"context_parallel_size": 2}],
    "PP": [STAGES],
    "VPP": [STAGES | {"virtual_pipeline_model_parallel_size": 2}],
    "EP": [{"num_moe_experts": 2, "moe_ffn_hidden_size": 8, "expert_model_parallel_size": 2, "add_bias_linear": False}],
    "recompute": [FULL, {"lsm_recompute": True}],
}  # fmt: skip


@pytest.mark.parametrize(
    "layout, changes", [(name, given) for name in IN_CONFIG for given in IN_CONFIG[name]]
)
def test_a_layout_that_a_mixer_cannot_take_is_refused(layout, changes, monkeypatch):
    monkeypatch.setattr(GatedLinearAttention, "unsupported", {layout: "it looks at the future"})
    config(["gla"] * 4)
    config(["deltanet"] * 4, **changes)
    with pytest.raises(ValueError, match=rf"^mixer gla .*\({layout}\)\n  why: it looks at the future\n"):
        config(["deltanet", "gla"] * 2, **changes)


def test_every_layout_can_be_refused(monkeypatch):
    assert {*IN_CONFIG} | {"packed", "decode"} == {*LAYOUTS}
    for layout in LAYOUTS:
        monkeypatch.setattr(GatedLinearAttention, "unsupported", {layout: "it looks at the future"})
        mixer = GatedLinearAttention(GatedLinearAttention.Config(hidden_size=16, num_heads=2, head_dim=8))
        check_supported(mixer, {name: name != layout for name in LAYOUTS})
        with pytest.raises(ValueError, match=layout):
            check_supported(mixer, {layout: True})

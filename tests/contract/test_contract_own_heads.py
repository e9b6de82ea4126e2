"""What four heads in one group do not reach: groups cut by ranks, heads counted by the mixer, extremes."""

import dataclasses
import math

import pytest
import torch

from linear_moe import lsm
from linear_moe.lsm import split
from tests.contract import layers
from tests.contract.cases import PLACE, assert_close, make
from tests.contract.layers import Layout
from tests.contract.test_contract_layer import whole
from tests.contract.test_contract_tables import THREE_PARTS

GROUPS = {
    "two of four heads": {"ssm_head_dim": 8, "state_size": 6, "num_groups": 2},
    "each head": {"ssm_head_dim": 8, "state_size": 6, "num_groups": 4},
    "cut by ranks": {"expand": 6.0, "ssm_head_dim": 8, "state_size": 6, "num_groups": 3},
}
"""The last: 12 heads, 4 in a group, 6 or 3 on a rank."""


@pytest.mark.parametrize("layout", [Layout(2, tp=2, sp=True), Layout(4, tp=4)], ids=["tp2-sp", "tp4"])
@pytest.mark.parametrize("groups", GROUPS)
def test_groups_over_ranks_are_one_process(gloo, groups, layout):
    ranks, single = (
        gloo(lay.world, layers.run_with, "mamba2", GROUPS[groups], lay) for lay in (layout, Layout(1))
    )
    assert not isinstance(ranks[0], str), ranks[0]
    assert_close(whole(ranks, layout), whole(single, Layout(1)))


@pytest.mark.parametrize(
    "name, hidden, options, heads",
    [
        ("mamba2", 2048, {}, 64),
        ("mamba2", 2048, {"expand": 1.5, "ssm_head_dim": 128}, 24),
        ("hgrn2", 2048, {}, 16),
        ("hgrn2", 896, {"expand_ratio": 64}, 14),
        ("retention", 2048, {}, 5),
    ],
)
def test_heads_in_a_model(name, hidden, options, heads):
    """Of a model whose softmax layers have 5 heads of 32."""
    config = lsm.get(name).Config.from_model(hidden_size=hidden, num_heads=5, head_dim=32, **options)
    assert config.num_heads == heads
    if name != "retention":
        assert (
            config.num_heads * config.head_dim
            == options.get("expand", 2.0 if name == "mamba2" else 1) * hidden
        )


@pytest.mark.parametrize(
    "name, options, named",
    [
        ("mamba2", {"ssm_head_dim": 96}, "ssm_head_dim"),
        ("mamba2", {"ssm_head_dim": 0}, "ssm_head_dim"),
        ("mamba2", {"ssm_head_dim": "64"}, "ssm_head_dim"),
        ("mamba2", {"ssm_head_dim": 4096}, "ssm_head_dim"),
        ("mamba2", {"expand": 1.3}, "ssm_head_dim"),
        ("mamba2", {"expand": None}, "expand"),
        ("mamba2", {"num_groups": 3}, "num_groups"),
        ("hgrn2", {"expand_ratio": 96}, "expand_ratio"),
        ("hgrn2", {"expand_ratio": True}, "expand_ratio"),
        ("hgrn2", {"expand_ratio": -128}, "expand_ratio"),
    ],
)
def test_heads_that_do_not_fit_are_refused(name, options, named):
    with pytest.raises(ValueError, match=THREE_PARTS) as refused:
        lsm.get(name).Config.from_model(hidden_size=1024, num_heads=8, head_dim=128, **options)
    assert str(refused.value).startswith(named)


@pytest.mark.parametrize(
    "name, options",
    [("mamba2", {}), ("gsa", {}), ("hgrn2", {}), ("gated_deltanet", {"values_per_key": 2})],
)
def test_a_norm_over_heads_has_no_mean(name, options):
    """A group norm is per head."""
    with pytest.raises(ValueError, match=THREE_PARTS) as refused:
        lsm.get(name).Config(hidden_size=16, num_heads=4, head_dim=8, output_norm="groupnorm", **options)
    assert str(refused.value).startswith("output_norm is 'groupnorm'")


@pytest.mark.parametrize(
    "name, options, named",
    [
        ("mamba2", {"expand_k": 0.5, "state_size": 5}, "expand_k 0.5 gives B and C of 2.5 channels"),
        ("based", {"expand_k": 0.5, "feature_dim": 5}, "expand_k 0.5 gives queries and keys of 2.5 channels"),
        (
            "rebased",
            {"expand_k": 0.5, "feature_dim": 5},
            "expand_k 0.5 gives queries and keys of 2.5 channels",
        ),
        ("retention", {"expand_k": 0.375}, "expand_k 0.375 gives keys of 3 channels"),
        ("rwkv7", {"output_gate": "swish"}, "output_gate is 'swish'"),
    ],
)
def test_what_only_one_mixer_refuses(name, options, named):
    """Options that are right for other mixers."""
    with pytest.raises(ValueError, match=THREE_PARTS) as refused:
        lsm.get(name).Config(hidden_size=16, num_heads=4, head_dim=8, **options)
    assert str(refused.value).startswith(named)


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_mamba2_norms_every_channel_with_its_own_weight(num_groups):
    """Also where every head is a group: a norm per head has one weight for all heads in other mixers."""
    (table,) = [
        t
        for t in make("mamba2", {"num_groups": num_groups}).mixer.all_parameters()
        if t.name == "norm_weight"
    ]
    assert table.shape == (4, 8) and table.per_head


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("logit", [-200.0, 0.0, 200.0])
@pytest.mark.parametrize("spread", [0.0, 300.0])
def test_hgrn2_at_extremes(layer, logit, spread):
    """float32: bounds of exactly 0 and 1 and saturated gates give finite gradients, and no memory grows."""
    inputs = make("hgrn2", dtype=torch.float32, tokens=5)
    table = inputs.w["lower_bounds"]
    table.data.copy_(spread * torch.linspace(-1, 1, table.numel()).view_as(table).flip(1))
    inputs.x.data.fill_(logit)
    inputs = dataclasses.replace(inputs, place=dataclasses.replace(PLACE, layer_of_kind=layer))
    p, _ = split.split(inputs.mixer, inputs.x, {}, inputs.w, inputs.place, lsm.MixerState(()), None)
    gated = inputs.mixer.gates(p, inputs.w, inputs.place)
    assert not (gated["log_decay"] > 0).any()
    torch.testing.assert_close(gated["k"], 1 - gated["log_decay"].exp(), atol=1e-6, rtol=0)
    sum(x.sum() for x in inputs.mix()[1].memory).backward()
    assert inputs.x.grad.isfinite().all() and table.grad.isfinite().all()


def test_retention_far_into_a_document():
    """A million tokens in, float32 products of rotated keys still depend on distances alone; xPos does not overflow."""
    for rotary in ("rope", "xpos"):
        inputs = make("retention", {"rotary": rotary}, dtype=torch.float32, tokens=9)
        near = inputs.mix()[0]
        far = inputs.mix(state=lsm.MixerState((), length=torch.tensor([1_000_003] * 2)))[0]
        torch.testing.assert_close(far, near, atol=2e-5, rtol=0)


def test_retention_decays_by_global_head():
    inputs = make("retention")
    place = dataclasses.replace(PLACE, num_heads=2, first_head=2)
    p = {name: torch.zeros(1, 1, 2, 8) for name in "qkv"} | {
        "positions": torch.zeros(1, 1, dtype=torch.int64)
    }
    log_decay = inputs.mixer.gates(p, {}, place)["log_decay"]
    assert log_decay.tolist() == pytest.approx([math.log(1 - 2**-7), math.log(1 - 2**-8)], rel=1e-6)

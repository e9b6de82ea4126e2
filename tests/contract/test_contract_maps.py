"""Feature maps: widths that the kernels take, what learned maps start as, and the weights that quadratic maps give."""

import math
import warnings

import pytest
import torch

from linear_moe import lsm
from linear_moe.launch.relay import is_our_line
from linear_moe.lsm import linear_attention
from linear_moe.lsm.feature_maps import FEATURE_MAPS, second_order
from tests.contract.cases import SHAPE, make
from tests.contract.test_contract_tables import THREE_PARTS

WIDE = {
    "dpfp": ("linear_attention", {"feature_map": "dpfp", "head_dim": 40}),
    "hedgehog": ("linear_attention", {"feature_map": "hedgehog", "head_dim": 136}),
    "keys": ("linear_attention", {"head_dim": 264}),
    "features": ("based", {"expand_k": 1.5}),
    "values of based": ("based", {"head_dim": 256}),
    "values": ("linear_attention", {"normalize": True, "head_dim": 256}),
}


@pytest.mark.parametrize("case", WIDE)
def test_too_wide_for_the_kernels(case):
    """Refused with the model, not at the first step."""
    name, given = WIDE[case]
    with pytest.raises(ValueError, match=THREE_PARTS) as refused:
        lsm.get(name).Config(**(SHAPE | given))
    assert "up to 256" in str(refused.value)


def test_widths_that_just_fit():
    config = lsm.get("linear_attention").Config
    assert config(**(SHAPE | {"feature_map": "dpfp", "head_dim": 32})).mapped_k_dim == 256
    assert config(**(SHAPE | {"feature_map": "hedgehog", "head_dim": 128})).mapped_k_dim == 256


def test_learned_maps_start_as_published():
    """Hedgehog as the identity; the others as torch's linear layers, queries and keys apart."""
    x = torch.randn(5, 8).double()
    for name in ("hedgehog", "t2r", "elementwise_product"):
        mixer = make("linear_attention", {"feature_map": name}).mixer
        w = {p.name: torch.full(p.shape, math.nan).double() for p in mixer.parameters()}
        assert {key.split("_")[2] for key in w} == {"q", "k"}
        for p in mixer.parameters():
            p.init(w[p.name])
        q = FEATURE_MAPS[name](x, w, "feature_map_q")
        if name == "hedgehog":
            truth = torch.cat([2 * x, -2 * x], -1).softmax(-1)
            assert torch.allclose(q, truth)
        else:
            assert all(0 < value.abs().max() <= 8**-0.5 for value in w.values())
            assert not torch.equal(q, FEATURE_MAPS[name](x, w, "feature_map_k"))


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
@pytest.mark.parametrize("name", ["linear_attention", "mom_linear_attention"])
def test_sums_that_may_be_0_are_divided_by_with_a_warning(feature_map, name):
    """One for each map and option, however many layers there are; such a model is made, as it was saved."""
    warn_once = linear_attention._warn_of_signs_once
    warn_once.cache_clear()
    mixer = make("linear_attention", {"feature_map": feature_map}).mixer
    w = {p.name: torch.randn(p.shape) for p in mixer.parameters()}
    has_signs = bool((FEATURE_MAPS[feature_map](torch.randn(99, 8), w, "feature_map_q") < 0).any())
    config = lsm.get(name).Config
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        config(**(SHAPE | {"feature_map": feature_map}))
        assert not said, "nothing is divided"
        for option in ("normalize", "norm_q", "norm_k"):
            for _ in range(3):
                assert getattr(config(**(SHAPE | {"feature_map": feature_map, option: True})), option)
    told = [str(warning.message) for warning in said]
    assert len(told) == 3 * has_signs and all(f"({feature_map})" in line for line in told)
    assert all(is_our_line(f"{w.filename}:{w.lineno}: UserWarning".encode()) for w in said), "a run shows it"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_elu_is_exact_below_zero(dtype):
    """One rounding: nothing is added to the little that a negative channel leaves, and its gradient is the same."""
    x = torch.linspace(-9, 9, 1001).to(dtype).requires_grad_()
    y = FEATURE_MAPS["elu"](x, {}, "")
    (grad,) = torch.autograd.grad(y.sum(), x)
    wide = x.detach().double()
    slope = wide.clamp(max=0).exp()
    torch.testing.assert_close(y.double(), slope + wide.relu(), rtol=torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(grad.double(), slope, rtol=torch.finfo(dtype).eps, atol=0)


def test_sizes_of_the_common_library():
    """Features of 16 channels; kda's waists are as wide as a value head, and its rate starts in (1, 16)."""
    assert [make(name).mixer.memory_shapes() for name in ("based", "rebased")] == [((153, 9),), ((136, 9),)]
    mixer = make("kda", {"expand_v": 2.0}).mixer
    assert {p.name: (p.rank, p.bias) for p in mixer.low_rank_projections()} == {
        "f": (16, False),
        "g": (16, True),
    }
    assert {p.rank for p in make("kda", {"gate_rank": 3}).mixer.low_rank_projections()} == {3}
    for given, bounds in ({}, (1, 16)), ({"lower_bound": -5.0}, (1, 1)):
        table = {p.name: p for p in make("kda", given).mixer.parameters()}
        rate = torch.empty(4096)
        table["A_log"].init(rate)
        low, high = rate.exp().aminmax()
        assert math.isclose(low, bounds[0], abs_tol=0.1) and math.isclose(high, bounds[1], abs_tol=0.1)


@pytest.mark.parametrize("width", [1, 2, 5, 16])
def test_second_order_has_every_pair_once(width):
    x = torch.randn(3, width).double()
    squares, pairs = second_order(x)
    truth = torch.stack([x[:, i] * x[:, j] for i in range(width) for j in range(i)] or [x[:, 0]], -1)
    assert torch.allclose(squares, x**2) and pairs.shape[-1] == width * (width - 1) // 2
    if width > 1:
        assert torch.allclose(pairs.sort(-1)[0], truth.sort(-1)[0])

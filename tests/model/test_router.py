"""Logits of a router from bfloat16: as exact as float32 copies of its input give them, forward and backward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter

from linear_moe.model import router
from linear_moe.model.router import in_halves, logits
from linear_moe.training.metrics import ExpertLoad
from tests.workers import with_model_parallel


def test_a_gradient_is_the_sum_of_two_halves() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 1000)
    high, low = in_halves(x)
    assert high.dtype == low.dtype == torch.bfloat16
    assert ((high.double() + low.double() - x.double()).abs() <= 2.0**-17 * x.double().abs()).all()


def test_logits_and_gradients_are_those_of_float64() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((5, 7, 48), (6, 48)))
    up = torch.randn(5, 7, 6, generator=generator)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    found = logits(*leaves)
    assert found.dtype == torch.float32
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    true = exact[0] @ exact[1].t()
    torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-5)
    for got, whole in zip(
        torch.autograd.grad(found, leaves, up), torch.autograd.grad(true, exact, up.double()), strict=True
    ):
        # one rounding of the result to bfloat16, and nothing besides
        assert got.dtype == torch.bfloat16
        assert (got.double() - whole).norm() <= 2.2e-3 * whole.norm()
        assert (got != whole.bfloat16()).float().mean() < 0.02


@pytest.mark.parametrize(("ranks", "count"), [(1, 4.0), (2, 4.5)])
def test_a_loss_weighs_by_the_tokens_that_are_no_padding(
    ranks: int, count: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over ranks that share a micro-batch; the other one has five."""
    monkeypatch.setattr(TopKRouter, "routing", lambda self, logits, padding_mask: padding_mask)
    monkeypatch.setattr(
        TopKRouter, "attach_and_log_load_balancing_loss", lambda self, *args, **kwargs: kwargs
    )
    group = SimpleNamespace(size=lambda: ranks)
    monkeypatch.setattr(router.dist, "all_reduce", lambda x, group: x.add_(5 if group.size() == 2 else 99))
    one = object.__new__(router.Router)
    one.tp_cp_group = group
    monkeypatch.setattr(router.Router, "_counts_its_choice", lambda self: False)
    is_padding = torch.tensor([[False, False, True], [False, False, True]])
    assert one.routing(torch.zeros(6, 4), is_padding) is is_padding
    given = one.attach_and_log_load_balancing_loss(aux_loss=1.0)
    assert given == {"aux_loss": 1.0, "valid_token_count": torch.tensor(count)}
    one.routing(torch.zeros(6, 4))
    assert one.attach_and_log_load_balancing_loss() == {}, "the next micro-batch has no padding"


def routed(
    rank: int, world_size: int, options: dict[str, Any], is_padded: bool, is_fused: bool = False
) -> list[list[Any]]:
    """Probabilities, choice and gradient of Megatron's router and of ours, and how often each took a top-k.

    Weights that are small integers, so that many logits of a token are equal; but none for a fused choice.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    defaults: dict[str, Any] = dict(
        num_layers=1, hidden_size=6, num_attention_heads=2, num_moe_experts=64, moe_router_topk=8,
        moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.3, moe_router_dtype="fp32",
        add_bias_linear=False,
    )  # fmt: skip
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    found, draw = [], torch.Generator().manual_seed(1)
    x_TBD, up = torch.randint(-1, 2, (30, 3, 6), generator=draw).float(), torch.randn(90, 64, generator=draw)
    weight_ED = torch.randint(-1, 2, (64, 6), generator=draw).float()
    if is_fused:
        x_TBD, weight_ED = torch.randn(30, 3, 6, generator=draw) + rank, torch.randn(64, 6, generator=draw)
    padding_TB = torch.arange(30)[:, None] >= torch.tensor([30, 20, 7]) if is_padded else None
    defaults |= dict(tensor_model_parallel_size=world_size, sequence_parallel=world_size > 1)
    with with_model_parallel(tp=world_size):
        for kind in (TopKRouter, router.Router):
            config = TransformerConfig(**(defaults | options))
            one = kind(config, ProcessGroupCollection.use_mpu_process_groups())
            one.layer_number = 1
            one.weight.data.copy_(weight_ED)
            load = ExpertLoad(1, 64)
            with (
                mock.patch.object(torch, "topk", wraps=torch.topk) as topk,
                mock.patch.object(router.Router, "_is_fused", lambda *_: is_fused),
            ):
                probs, chosen = one(x_TBD, padding_TB)
            load._count(one, (x_TBD,), (probs, chosen))
            (probs * up).sum().backward()
            found.append([probs.detach(), chosen, one.weight.grad, topk.call_count, load.tokens_LE])
    return found


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"moe_router_pre_softmax": True, "moe_router_load_balancing_type": "seq_aux_loss"},
        {"moe_router_load_balancing_type": ["aux_loss", "global_aux_loss"], "moe_aux_loss_coeff": [0.2, 0.1]},
        {"moe_z_loss_coeff": 0.1},
        {"moe_router_score_function": "sigmoid"},
        {"moe_expert_capacity_factor": 1.0},
    ],
    ids=["after", "sequence, before", "two losses", "of logits too", "sigmoid", "dropped"],
)
def test_routes_and_balances_as_megatron_with_one_choice(
    gloo: Any, options: dict[str, Any], is_padded: bool
) -> None:
    """To the bit, where most tokens have equal logits; and of more than scores, as often as Megatron.

    A gradient of three terms, with one of the logits' own, is added in another order.
    """
    ((stock, ours),) = gloo(1, routed, options, is_padded)
    for truth, found in zip(stock[:3], ours[:3], strict=True):
        if truth is stock[2] and "moe_z_loss_coeff" in options:
            torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(found, truth)
    once = not options.keys() & {"moe_router_score_function", "moe_expert_capacity_factor"}
    assert stock[3] - ours[3] == once and stock[2].abs().max() > 0


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5},
        {
            "moe_router_load_balancing_type": ["aux_loss"],
            "moe_aux_loss_coeff": [0.2],
            "moe_z_loss_coeff": 0.1,
        },
        {"moe_router_load_balancing_type": "none"},
        {"calculate_per_token_loss": True},
    ],
    ids=["after", "before, scaled", "of logits too", "no loss", "per token"],
)
def test_routes_in_one_pass_as_megatron(
    gloo: Any, options: dict[str, Any], is_padded: bool, world_size: int
) -> None:
    """The sums over tokens are those of a kernel; here it is the torch path that stands for it."""
    if is_padded and world_size > 1 and "calculate_per_token_loss" in options:
        pytest.skip("Megatron takes the tokens of both ranks for those of one: see the module's first lines")
    for stock, ours in gloo(world_size, routed, options, is_padded, True):
        torch.testing.assert_close(ours[0], stock[0], rtol=1e-5, atol=1e-7)
        assert torch.equal(ours[1], stock[1]) and torch.equal(ours[4], stock[4])
        torch.testing.assert_close(ours[2], stock[2], rtol=1e-4, atol=1e-5)
        assert stock[3] and not ours[3] and stock[2].abs().max() > 0


@pytest.mark.parametrize(
    ("types", "name", "is_one_pass"),
    [
        ("aux_loss", "triton", True),
        ("none", "triton", True),
        (["aux_loss"], "triton", True),
        (["aux_loss", "seq_aux_loss"], "triton", False),
        ("seq_aux_loss", "triton", False),
        ("aux_loss", "chunked", False),
    ],
)
def test_when_one_pass_does(
    types: Any, name: str, is_one_pass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router.dispatch, "pick", lambda *_: SimpleNamespace(name=name))
    one = object.__new__(router.Router)
    one.routing_type = types
    assert one._is_fused(torch.zeros(2, 3)) == is_one_pass


HALF, WHOLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("is_cuda", "x", "weight", "bias", "router_dtype", "here"),
    [
        (True, HALF, HALF, None, "fp32", True),
        (False, HALF, HALF, None, "fp32", False),
        (True, WHOLE, HALF, None, "fp32", False),
        (True, HALF, WHOLE, None, "fp32", False),
        (True, HALF, HALF, 1, "fp32", False),
        (True, HALF, HALF, None, "fp64", False),
    ],
)
def test_whose_logits_they_are(
    is_cuda: bool,
    x: torch.dtype,
    weight: torch.dtype,
    bias: Any,
    router_dtype: str,
    here: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Megatron's, wherever ours would be others: a bias, or another precision."""
    monkeypatch.setattr(TopKRouter, "gating", lambda self, input: "theirs")
    monkeypatch.setattr(router, "logits", lambda input, weight_ED: (input, weight_ED))
    one: Any = object.__new__(router.Router)
    one.weight, one.bias = SimpleNamespace(dtype=weight), bias
    one.config = SimpleNamespace(moe_router_dtype=router_dtype)
    given: Any = SimpleNamespace(is_cuda=is_cuda, dtype=x)
    assert one.gating(given) == ((given, one.weight) if here else "theirs")

"""Logits of a router from bfloat16: as exact as float32 copies of its input give them, forward and backward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter

from linear_moe.model import router
from linear_moe.model.router import in_halves, logits


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
    is_padding = torch.tensor([[False, False, True], [False, False, True]])
    assert one.routing(torch.zeros(6, 4), is_padding) is is_padding
    given = one.attach_and_log_load_balancing_loss(aux_loss=1.0)
    assert given == {"aux_loss": 1.0, "valid_token_count": torch.tensor(count)}
    one.routing(torch.zeros(6, 4))
    assert one.attach_and_log_load_balancing_loss() == {}, "the next micro-batch has no padding"


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

"""Logits of a router from bfloat16: as exact as float32 copies of its input give them, forward and backward."""

from __future__ import annotations

import torch

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

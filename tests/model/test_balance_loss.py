"""The loss that balances memories: its value, its gradient through the weights, and its tally."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from linear_moe.model.memory_balance import MemoryBalance

B, T, E, K = 2, 6, 4, 2


@pytest.fixture(autouse=True)
def plain_scale():
    before = MoEAuxLossAutoScaler.main_loss_backward_scale
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor(1.0)
    yield
    MoEAuxLossAutoScaler.main_loss_backward_scale = before


def balance(coefficient: float, tp: int = 1, per_token: bool = False) -> MemoryBalance:
    groups = SimpleNamespace(tp=SimpleNamespace(size=lambda: tp), cp=SimpleNamespace(size=lambda: 1))
    config = SimpleNamespace(calculate_per_token_loss=per_token)
    return MemoryBalance(config, 3, E, coefficient, groups)


def routed(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    probs = logits.softmax(-1)
    weight, index = probs.topk(K)
    return weight, probs, index


@pytest.mark.parametrize("tp, per_token, factor", [(1, False, 1), (2, False, 1 / 2), (1, True, B * T)])
def test_the_gradient_is_that_of_the_loss(tp, per_token, factor):
    torch.manual_seed(0)  # some choices are balanced, and there is no gradient
    logits = torch.randn(B, T, E, requires_grad=True)
    weight, probs, index = routed(logits)
    attached = balance(0.25, tp, per_token).attach(weight, probs, index)
    assert torch.equal(attached, weight)
    (found,) = torch.autograd.grad((0 * attached).sum(), logits)
    share = torch.zeros(E)
    for e in index.flatten().tolist():
        share[e] += 1 / (B * T * K)
    loss = 0.25 * E * (share * routed(logits)[1].mean((0, 1))).sum()
    (truth,) = torch.autograd.grad(factor * loss, logits)
    assert torch.allclose(found, truth, rtol=1e-5, atol=1e-8) and truth.abs().max() > 1e-5


def test_no_coefficient_no_gradient():
    logits = torch.randn(B, T, E, requires_grad=True)
    attached = balance(0.0).attach(*routed(logits))
    assert not torch.autograd.grad((0 * attached).sum(), logits)[0].any()


def test_the_tally_is_taken_once():
    even = balance(1.0)
    index = torch.arange(B * T * K).view(B, T, K) % E
    probs = torch.full((B, T, E), 1 / E, requires_grad=True)
    for _ in range(3):
        even.attach(probs[..., :K], probs, index)
    with torch.no_grad():  # the first pass of a recomputed layer
        even.attach(probs[..., :K], probs, index)
    assert torch.allclose(even.take(), torch.tensor([3.0, 3.0, *[0.75] * E]))

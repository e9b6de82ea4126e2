"""The loss that balances memories: its value, its gradient through the weights, and its tally."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from linear_moe.model import memory_balance
from linear_moe.model.memory_balance import MemoryBalance

B, T, E, K = 3, 6, 4, 2


@pytest.fixture(autouse=True)
def plain_scale():
    before = MoEAuxLossAutoScaler.main_loss_backward_scale
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor(1.0)
    yield
    MoEAuxLossAutoScaler.main_loss_backward_scale = before


def balance(coefficient: float, tp: int = 1, per_token: bool = False, cp: int = 1) -> MemoryBalance:
    groups = SimpleNamespace(tp=SimpleNamespace(size=lambda: tp), cp=SimpleNamespace(size=lambda: cp))
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


@pytest.mark.parametrize("per_token", [False, True])
def test_padding_is_as_if_it_were_not_there(per_token):
    torch.manual_seed(1)
    logits = torch.randn(1, T, E, requires_grad=True)
    found, truth = balance(0.5, per_token=per_token), balance(0.5, per_token=per_token)
    found.padding_BT = torch.tensor([[False] * 4 + [True] * 2])
    of_found = torch.autograd.grad((0 * found.attach(*routed(logits))).sum(), logits)[0]
    of_truth = torch.autograd.grad((0 * truth.attach(*routed(logits[:, :4]))).sum(), logits)[0]
    torch.testing.assert_close(of_found, of_truth)
    assert of_truth[:, :4].abs().max() > 1e-5 and not of_found[:, 4:].any()
    torch.testing.assert_close(found.take(), truth.take())


def test_shares_are_of_all_ranks_of_a_sequence(monkeypatch):
    """Two ranks hold half of it each: every one adds its own tokens' part of the same loss."""
    torch.manual_seed(2)
    logits = torch.randn(1, T, E, requires_grad=True)
    whole = balance(0.5)
    of_whole = torch.autograd.grad((0 * whole.attach(*routed(logits))).sum(), logits)[0]
    chosen = torch.zeros(1, T, E).scatter(2, routed(logits)[2], 1.0)
    pieces, balances = [], []
    for half in (slice(0, T // 2), slice(T // 2, T)):
        others = chosen.sum(1)[0] - chosen[:, half].sum(1)[0]
        monkeypatch.setattr(memory_balance.dist, "all_reduce", lambda x, group, others=others: x.add_(others))
        part = balance(0.5, cp=2)
        attached = part.attach(*routed(logits[:, half]))
        pieces.append(torch.autograd.grad((0 * attached).sum(), logits)[0])
        balances.append(part.take())
    torch.testing.assert_close(sum(pieces), of_whole)
    tally = whole.take()
    assert torch.allclose(balances[0][1] + balances[1][1], tally[1])
    assert torch.allclose(balances[0][2:], tally[2:]) and torch.allclose(balances[1][2:], tally[2:])


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
    even.attach(probs[..., :K], probs, index)
    assert torch.allclose(even.take(), torch.tensor([1.0, 1.0, *[0.25] * E]))

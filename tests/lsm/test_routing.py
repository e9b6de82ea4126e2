"""Slots of mixtures: sorted by memory, run and time, cut at a capacity, gathered and scattered; and the routing."""

import math

import pytest
import torch
from torch import Tensor

from linear_moe.lsm import routing
from linear_moe.lsm.routing import Slots
from tests.contract.cases import assert_close, gradients, make, outputs
from tests.contract.loop import loop

E, K = 4, 2


def choices(tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, E, generator=generator).topk(K).indices


def expected(choice: list[list[int]], run: list[int], num_runs: int, limit: int | None) -> list[tuple]:
    """``(memory, run, token, slot)`` in order, kept ones only."""
    found = []
    for memory in range(E):
        for n in range(num_runs):
            mine = [
                (memory, n, t, t * K + choice[t].index(memory))
                for t in range(len(run))
                if run[t] == n and memory in choice[t]
            ]
            found += mine[:limit]
    return found


@pytest.mark.parametrize("limit", [None, 3, 1])
@pytest.mark.parametrize(
    "run",
    [[0] * 40, [0] * 7 + [1] * 20 + [3] * 13, [*range(60, 100)]],
    ids=["one", "four, one empty", "more keys than a byte has"],
)
def test_slots_are_sorted_by_memory_run_and_time(run, limit):
    num_runs = max(run) + 1
    choice = choices(40)
    limits = None if limit is None else torch.full((num_runs,), limit)
    slots = Slots.sort(choice, torch.tensor(run), E, num_runs, limits)
    truth = expected(choice.tolist(), run, num_runs, limit)
    kept = len(truth)
    assert slots.order[:kept].tolist() == [slot for *_, slot in truth]
    assert slots.memory[:kept].tolist() == [memory for memory, *_ in truth]
    assert (slots.order // slots.per_token)[:kept].tolist() == [t for _, _, t, _ in truth]
    assert (slots.memory[kept:] == E).all() and int(slots.cu_seqlens[-1]) == kept
    assert sorted(slots.order.tolist()) == list(range(40 * K))
    assert torch.equal(slots.place[slots.order], torch.arange(40 * K))
    for i, (start, end) in enumerate(zip(slots.cu_seqlens[:-1], slots.cu_seqlens[1:])):
        assert {truth[j][:2] for j in range(start, end)} <= {(i // num_runs, i % num_runs)}
    ends = [sum(memory <= m for memory, *_ in truth) for m in range(E - 1)] + [40 * K]
    assert slots.ends.tolist() == ends


def test_gather_and_scatter_and_their_gradients():
    slots = Slots.sort(choices(11), torch.tensor([0] * 4 + [1] * 7), E, 2)
    x = torch.randn(11, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(11, K, dtype=torch.float64, requires_grad=True)
    assert torch.equal(slots.gather(x), x[(slots.order // slots.per_token)])
    y = torch.randn(22, 3, dtype=torch.float64, requires_grad=True)
    truth = torch.zeros(11, 3, dtype=torch.float64)
    truth = truth.index_add(0, (slots.order // slots.per_token), y * weight.flatten()[slots.order, None])
    assert torch.allclose(slots.scatter(y, weight), truth, atol=1e-14)
    assert torch.autograd.gradcheck(slots.gather, [x]) and torch.autograd.gradcheck(
        slots.scatter, [y, weight]
    )


def test_weights_are_a_renormalised_softmax():
    logits = torch.randn(2, 5, E, dtype=torch.float64)
    probs, weight, choice = routing.route(logits, K)
    for b in range(2):
        for t in range(5):
            exp = [math.exp(x) for x in logits[b, t].tolist()]
            best = sorted(range(E), key=lambda e: -exp[e])[:K]
            assert choice[b, t].tolist() == best
            for e, found in zip(best, weight[b, t].tolist()):
                assert found == pytest.approx(exp[e] / sum(exp[e] for e in best), rel=1e-12)
            assert probs[b, t].tolist() == pytest.approx([x / sum(exp) for x in exp], rel=1e-12)


@pytest.mark.parametrize("capacity", [0.4, 1.0, 10.0])
def test_capacity_keeps_the_first_tokens_of_a_memory(capacity):
    """Dropped tokens neither write nor read; outputs and gradients are those of the loop over the kept ones."""
    inputs = make("mom_gated_deltanet", {"capacity": capacity}, tokens=40, runs=2)
    truth, found = outputs(loop(inputs)), outputs(inputs.mix())
    leaves = inputs.tensors()
    assert_close(found | gradients(found, leaves), truth | gradients(truth, leaves))
    unlimited = outputs(make("mom_gated_deltanet", tokens=40, runs=2).mix())
    assert torch.equal(found["o"], unlimited["o"]) == (capacity == 10.0)

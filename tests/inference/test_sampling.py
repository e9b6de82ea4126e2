"""Sampling against its definition, written with Python lists."""

import pytest
import torch

from linear_moe.inference.sampling import Sampling, draws


def definition(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Probabilities: the top_k largest, of those the fewest that reach top_p."""
    weights = [torch.tensor(x / temperature, dtype=torch.float64).exp().item() for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])[: top_k or None]
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        kept.append(i)
        mass += weights[i] / total
        if mass >= top_p:
            break
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.5, 0, 1.0),
        (2.0, 3, 1.0),
        (1.0, 0, 0.7),
        (1.5, 5, 0.6),
        (1.0, 100, 1e-9),
        (1.0, 1, 1.0),
    ],
)
def test_probabilities(temperature, top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(4, 11, dtype=torch.float64) * 2
    p = Sampling(temperature, top_k, top_p).probabilities(logits)
    wanted = torch.tensor(
        [definition(row, temperature, top_k, top_p) for row in logits.tolist()], dtype=torch.float64
    )
    torch.testing.assert_close(p, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.9}, {}], ids=str)
def test_draws_follow_the_probabilities(options):
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]]).expand(20000, 4)
    sampling = Sampling(temperature=0.8, **options)
    tokens = sampling.choose(logits, torch.rand(20000, generator=torch.Generator().manual_seed(3)))
    shares = tokens.bincount(minlength=4) / len(tokens)
    torch.testing.assert_close(shares, sampling.probabilities(logits[:1])[0], rtol=0, atol=0.015)


def test_the_ends_of_the_interval_are_possible_tokens():
    logits = torch.tensor([[-float("inf"), 0.0, 1.0, -float("inf")]] * 2)
    almost_one = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert Sampling(1.0).choose(logits, almost_one).tolist() == [1, 2]
    assert Sampling(1.0, top_p=0.999).choose(logits, almost_one).tolist() == [2, 1]


def test_greedy_needs_no_draw():
    assert Sampling().choose(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([float("nan")])).tolist() == [1]


def test_draws_depend_on_the_row_s_seed_alone():
    both, alone = draws([5, 9], 40, torch.device("cpu")), draws([9], 7, torch.device("cpu"))
    assert both.shape == (40, 2) and torch.equal(both[:7, 1], alone[:, 0])
    assert both.min() >= 0 and both.max() < 1 and not torch.equal(both[:, 0], both[:, 1])


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
    ],
)
def test_what_is_no_choice_is_refused(options, what):
    with pytest.raises(ValueError, match=rf"^{what}\n  why: [^\n]+\n  try: {what.split()[0]}="):
        Sampling(**options)

"""Sampling against its definition, written with Python lists."""

import pytest
import torch

from linear_moe.inference.sampling import Sampling


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


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]]).expand(20000, 4)
    sampling = Sampling(temperature=0.8, top_k=3)
    tokens = sampling.choose(logits, torch.Generator().manual_seed(3))
    shares = tokens.bincount(minlength=4) / len(tokens)
    torch.testing.assert_close(shares, sampling.probabilities(logits[:1])[0], rtol=0, atol=0.015)


def test_greedy_draws_nothing():
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    assert Sampling().choose(torch.tensor([[0.0, 2.0, 1.0]]), generator).tolist() == [1]
    assert torch.equal(generator.get_state(), before)

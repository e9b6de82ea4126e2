"""Cross entropy that turns logits into their gradient: torch path, fused passes (interpreted), vocabulary slices."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cross_entropy_cases import CASES, errors, make
from run_interpreted import errors_of_picked

from linear_moe.kernels import cross_entropy, cross_entropy_

EXACT, SINGLE = 1e-12, 1e-5


@pytest.fixture(scope="module")
def fused_errors(request: pytest.FixtureRequest) -> Callable[[str], list[float]]:
    return errors_of_picked(request, "cross_entropy_cases")


@pytest.mark.parametrize("name", CASES)
def test_torch_path_is_exact(name: str) -> None:
    assert max(errors(name, cross_entropy.cross_entropy_, torch.float64)) <= EXACT


@pytest.mark.parametrize("name", CASES)
def test_fused_passes(name: str, fused_errors: Callable[[str], list[float]]) -> None:
    assert len(fused_errors(name)) == 2 and max(fused_errors(name)) <= SINGLE


def test_half_precision_rounds_once() -> None:
    """The loss of bfloat16 logits is exact to float32, and their gradient to bfloat16."""
    logits, labels, weight = make("many", torch.float64)
    low, whole = logits.to(torch.bfloat16), logits.to(torch.bfloat16).double()
    loss, truth = cross_entropy_(low, labels, weight.float()), cross_entropy_(whole, labels, weight)
    assert loss.dtype == torch.float32 and (loss - truth).abs().max() <= SINGLE * truth.abs().max()
    assert ((low - whole).abs() <= 2**-8 * whole.abs() + SINGLE).all()


def test_slices_of_the_vocabulary_are_the_whole() -> None:
    logits, _, weight = make("many", torch.float64)
    whole, labels = logits.clone(), torch.tensor([1, 2, 699, 700])  # at the ends of slices
    loss = cross_entropy_(whole, labels, weight)
    cuts = (0, 2, 700, logits.shape[1])
    slices = [logits[:, a:b].contiguous() for a, b in itertools.pairwise(cuts)]
    found = [cross_entropy.statistics(x, labels - first) for x, first in zip(slices, cuts)]
    largest = torch.stack([f[0] for f in found]).amax(0)
    total = sum(f[1] * (f[0] - largest).exp() for f in found)
    combined = largest, total, sum(f[2] for f in found)
    for x, first, last in zip(slices, cuts, cuts[1:]):
        part = cross_entropy_(x, labels - first, weight, combine=lambda _: combined)
        assert (part - loss).abs().max() <= EXACT and (x - whole[:, first:last]).abs().max() <= EXACT


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(logits=torch.zeros(6, 4).t()), "strides"),
        (dict(logits=torch.zeros(1, 6).expand(4, 6)), "rows that share memory"),
        (dict(logits=torch.zeros(4, 6, requires_grad=True)), "logits requires a gradient"),
        (dict(logits=torch.zeros(24)), r"logits has shape \[24\]"),
        (dict(logits=torch.zeros(4, 6).int()), "logits is torch.int32"),
        (dict(labels=torch.zeros(4, dtype=torch.int32)), "labels is torch.int32"),
        (dict(labels=torch.zeros(4, dtype=torch.int64, device="meta")), "labels is torch.int64 on meta"),
        (dict(labels=torch.zeros(5, dtype=torch.int64)), r"labels has shape \[5\]"),
        (dict(weight=torch.zeros(4).int()), "weight is torch.int32"),
        (dict(weight=torch.zeros(5)), r"weight has shape \[5\]"),
    ],
)
def test_refuses_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    arguments = dict(
        logits=torch.zeros(4, 6), labels=torch.zeros(4, dtype=torch.int64), weight=torch.zeros(4)
    )
    with pytest.raises(ValueError, match=message):
        cross_entropy_(**{**arguments, **change})

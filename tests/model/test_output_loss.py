"""Output layer and loss in chunks, against logits and cross entropy of everything at once."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.model.output_loss import loss_in_chunks


class OneRank:
    """The part of a process group that is asked for."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    mask = (torch.rand(2, 13, generator=generator) > 0.3).double()
    labels = torch.randint(0, 37, (2, 13), generator=generator)
    return dict(hidden=draw(13, 2, 8), weight=draw(37, 8), labels=labels, mask=mask)


def run(inputs: dict[str, Tensor], chunk: int, factor: Any) -> list[Tensor]:
    """Losses and gradients, with ``(losses * factor).sum()`` as what is minimised."""
    hidden, weight = (inputs[n].clone().requires_grad_() for n in ("hidden", "weight"))
    layer: Any = types.SimpleNamespace(
        weight=weight, tp_group=OneRank(), sequence_parallel=False, _forward_pre_hooks={}
    )
    losses = loss_in_chunks(chunk)(
        hidden_states=hidden,
        output_layer=layer,
        output_weight=None,
        labels=inputs["labels"],
        loss_mask=inputs["mask"],
    )
    return [losses.detach(), *torch.autograd.grad((losses * factor).sum(), [hidden, weight])]


def truth(inputs: dict[str, Tensor], factor: Any) -> list[Tensor]:
    hidden, weight = (inputs[n].clone().requires_grad_() for n in ("hidden", "weight"))
    logits = (hidden @ weight.t()).transpose(0, 1)
    losses = F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), reduction="none").view(2, 13)
    return [losses.detach(), *torch.autograd.grad((losses * factor).sum(), [hidden, weight])]


@pytest.mark.parametrize("chunk", [1, 7, 26, 1000])
def test_equals_all_logits_at_once(inputs: dict[str, Tensor], chunk: int) -> None:
    factor = inputs["mask"] * -3.7
    for found, expected in zip(run(inputs, chunk, factor), truth(inputs, factor), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_nothing_unmasked_has_no_gradient(inputs: dict[str, Tensor]) -> None:
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    _, d_hidden, d_weight = run(inputs, 7, inputs["mask"])
    assert d_hidden.abs().max() == d_weight.abs().max() == 0


def test_another_weighting_than_the_mask_is_not_silently_wrong(inputs: dict[str, Tensor]) -> None:
    factor = inputs["mask"].clone()
    factor[0, 0] = 2.0
    _, d_hidden, d_weight = run(inputs, 7, factor)
    assert d_hidden.isnan().all() and d_weight.isnan().all()


def test_evaluation_computes_no_gradient(inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        layer: Any = types.SimpleNamespace(
            weight=inputs["weight"], tp_group=OneRank(), sequence_parallel=False, _forward_pre_hooks={}
        )
        losses = loss_in_chunks(5)(
            hidden_states=inputs["hidden"],
            output_layer=layer,
            output_weight=None,
            labels=inputs["labels"],
            loss_mask=inputs["mask"],
        )
    torch.testing.assert_close(losses, truth(inputs, 1.0)[0], rtol=0, atol=1e-12)

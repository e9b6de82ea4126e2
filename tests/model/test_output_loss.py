"""Output layer and loss in chunks, against logits and cross entropy of everything at once."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
    kept, weights = torch.rand(2, 2, 13, generator=generator, dtype=torch.float64)
    mask = torch.where(kept > 0.3, 0.1 * weights, 0.0)  # tokens may weigh differently
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
    losses = F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), reduction="none").view(2, -1)
    return [losses.detach(), *torch.autograd.grad((losses * factor).sum(), [hidden, weight])]


@pytest.mark.parametrize("chunk", [1, 7, 26, 1000])
def test_equals_all_logits_at_once(
    inputs: dict[str, Tensor], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty_like = torch.empty_like  # what is read before it is written is NaN
    monkeypatch.setattr(torch, "empty_like", lambda x, **how: empty_like(x, **how).fill_(torch.nan))
    factor = inputs["mask"] * -3.7
    for found, expected in zip(run(inputs, chunk, factor), truth(inputs, factor), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_nothing_unmasked_has_no_gradient(inputs: dict[str, Tensor]) -> None:
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    _, d_hidden, d_weight = run(inputs, 7, inputs["mask"])
    assert d_hidden.abs().max() == d_weight.abs().max() == 0


@pytest.mark.parametrize("scale", [-1.0, 1e-6])
@pytest.mark.parametrize("masked", [False, True])
def test_another_weighting_than_the_mask_is_not_silently_wrong(
    inputs: dict[str, Tensor], scale: float, masked: bool
) -> None:
    factor = inputs["mask"].clone()
    token = (factor == 0 if masked else factor > 0).nonzero()[0]
    factor[tuple(token)] += 2.0
    _, d_hidden, d_weight = run(inputs, 7, scale * factor)
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


def test_half_precision_rounds_once_per_product(inputs: dict[str, Tensor]) -> None:
    """Logits and their gradient are bfloat16; losses, and sums over tokens, float32."""
    low = {name: x.bfloat16() for name, x in inputs.items() if name in ("hidden", "weight")}
    factor = inputs["mask"].float() * 2.5
    found = run(inputs | low | {"mask": inputs["mask"].float()}, 5, factor)
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    expected = truth(inputs | {name: x.double() for name, x in low.items()}, factor.double())
    for got, wanted in zip(found, expected, strict=True):
        assert (got.double() - wanted).norm() <= 0.01 * wanted.norm()
    many = {"hidden": low["hidden"].repeat(200, 1, 1), "labels": inputs["labels"].repeat(1, 200)}
    many |= {"weight": low["weight"], "mask": inputs["mask"].float().repeat(1, 200)}
    d_weight = run(many, 26, many["mask"])[2].double() / 200
    wanted = expected[2] / 2.5
    assert (d_weight - wanted).norm() <= 0.01 * wanted.norm(), "a sum of 200 chunks"


def test_weights_that_are_on_their_way_are_waited_for(inputs: dict[str, Tensor]) -> None:
    """Those of a distributed optimizer that overlaps: its hooks wait in a call of the layer, and none is made here."""
    layer: Any = types.SimpleNamespace(
        weight=torch.full_like(inputs["weight"], torch.nan), tp_group=OneRank(), sequence_parallel=False
    )
    layer._forward_pre_hooks = {0: lambda module, args: module.weight.copy_(inputs["weight"])}
    losses = loss_in_chunks(5)(
        hidden_states=inputs["hidden"],
        output_layer=layer,
        output_weight=None,
        labels=inputs["labels"],
        loss_mask=inputs["mask"],
    )
    torch.testing.assert_close(losses, truth(inputs, 1.0)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_of_both_learns(inputs: dict[str, Tensor], frozen: str) -> None:
    hidden, weight = (inputs[n].clone().requires_grad_(n != frozen) for n in ("hidden", "weight"))
    layer: Any = types.SimpleNamespace(
        weight=None, tp_group=OneRank(), sequence_parallel=False, _forward_pre_hooks={}
    )
    losses = loss_in_chunks(7)(
        hidden_states=hidden,
        output_layer=layer,
        output_weight=weight,  # that of the embedding
        labels=inputs["labels"],
        loss_mask=inputs["mask"],
    )
    learns = weight if frozen == "hidden" else hidden
    (found,) = torch.autograd.grad((losses * inputs["mask"]).sum(), [learns])
    expected = truth(inputs, inputs["mask"])[2 if frozen == "hidden" else 1]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def slice_of_the_vocabulary(rank: int, world: int, inputs: dict[str, Tensor], sequence_parallel: bool) -> Any:
    """Losses and gradients of one rank of two."""
    hidden, weight = inputs["hidden"], inputs["weight"].chunk(world)[rank]
    hidden = hidden.chunk(world)[rank] if sequence_parallel else hidden
    hidden, weight = (x.clone().requires_grad_() for x in (hidden, weight))
    layer: Any = types.SimpleNamespace(
        weight=weight,
        tp_group=torch.distributed.group.WORLD,
        sequence_parallel=sequence_parallel,
        _forward_pre_hooks={},
    )
    losses = loss_in_chunks(5)(
        hidden_states=hidden,
        output_layer=layer,
        output_weight=None,
        labels=inputs["labels"],
        loss_mask=inputs["mask"],
    )
    return [losses.detach(), *torch.autograd.grad((losses * inputs["mask"]).sum(), [hidden, weight])]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_slices_of_the_vocabulary_are_the_whole(gloo: Any, sequence_parallel: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    mask = (torch.rand(2, 14, generator=generator) > 0.3).double()
    labels = torch.randint(0, 38, (2, 14), generator=generator)
    inputs = dict(hidden=draw(14, 2, 8), weight=5 * draw(38, 8), labels=labels, mask=mask)
    hidden, weight = (inputs[n].clone().requires_grad_() for n in ("hidden", "weight"))
    whole = (hidden @ weight.t()).transpose(0, 1)
    losses = F.cross_entropy(whole.flatten(0, 1), labels.flatten(), reduction="none").view(2, 14)
    d_hidden, d_weight = torch.autograd.grad((losses * mask).sum(), [hidden, weight])
    for rank, found in enumerate(gloo(2, slice_of_the_vocabulary, inputs, sequence_parallel)):
        own = d_hidden.chunk(2)[rank] if sequence_parallel else d_hidden
        for got, wanted in zip(found, [losses.detach(), own, d_weight.chunk(2)[rank]], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


class Products(TorchDispatchMode):
    """Keeps the storage of every matrix product, so that none is given out twice."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.mm:
            self.seen[out.untyped_storage().data_ptr()] = out.untyped_storage()
        return out


def test_one_chunk_of_logits_exists_at_a_time(inputs: dict[str, Tensor]) -> None:
    with Products() as products:
        run(inputs, 7, inputs["mask"])
    bytes_of_chunk = 7 * 37 * 8
    sizes = [storage.nbytes() for storage in products.seen.values()]
    assert sizes.count(bytes_of_chunk) == 1 and max(sizes) == bytes_of_chunk, sizes

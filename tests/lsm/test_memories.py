"""Projections of tokens and of their memories' slots in one tensor, and the memories' biases, against plain torch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from linear_moe import lsm
from linear_moe.lsm import memories, mom, registry
from linear_moe.lsm.routing import Slots
from linear_moe.lsm.tables import Projection
from tests.contract.cases import make

B, T, E, K, H = 2, 5, 3, 2, 2
WIDTHS = {"k": 3, "q": 2, "v": 4, "w": 1}


def slots_of(limit: int | None = None) -> Slots:
    choice = torch.rand(B * T, E, generator=torch.Generator().manual_seed(0)).topk(K).indices
    limits = None if limit is None else torch.full((B,), limit)
    return Slots.sort(choice, torch.arange(B * T) // T, E, B, limits)


def plain(x_BTHC: Tensor, own_MHC: Tensor | None, own: set[str], slots: Slots, of_tokens: bool) -> Tensor:
    """Name by name."""
    theirs = {name: width for name, width in WIDTHS.items() if of_tokens or name not in own}
    named = dict(zip(theirs, x_BTHC.flatten(0, 1).split(list(theirs.values()), -1), strict=True))
    found = {}
    if own_MHC is not None:
        widths = [width for name, width in WIDTHS.items() if name in own]
        found = dict(zip([n for n in WIDTHS if n in own], own_MHC.split(widths, -1), strict=True))
    token_M = slots.order // slots.per_token
    parts = []
    for name in WIDTHS:
        rows = found[name] if name in own else named[name][token_M]
        parts.append(torch.cat([named[name], rows]) if of_tokens else rows)
    return torch.cat(parts, -1)[None]


@pytest.mark.parametrize("of_tokens", [True, False])
@pytest.mark.parametrize(
    "own", [set(), {"k"}, {"k", "v", "w"}, {"v", "k"}], ids=lambda own: "".join(sorted(own))
)
def test_tokens_and_slots_side_by_side(own: set[str], of_tokens: bool) -> None:
    slots, generator = slots_of(), torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    theirs = sum(width for name, width in WIDTHS.items() if of_tokens or name not in own)
    wide = draw(T, B, H, theirs + 3)  # time first, and a slice
    own_MHC = draw(B * T * K, H, sum(WIDTHS[name] for name in own)) if own else None
    leaves = [x.requires_grad_() for x in (wide, own_MHC) if x is not None]
    x_BTHC = wide.transpose(0, 1)[..., :theirs]
    found = memories.side_by_side(WIDTHS, x_BTHC, own_MHC, own, slots, of_tokens=of_tokens)
    expected = plain(x_BTHC, own_MHC, own, slots, of_tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    direction = draw(*found.shape)
    for got, wanted in zip(
        torch.autograd.grad((found * direction).sum(), leaves),
        torch.autograd.grad((expected * direction).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-14)


def test_gradients_have_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reference's moves of rows, which have: a wrong second derivative would be silent."""
    monkeypatch.setenv("LINEAR_MOE_KERNELS", "reference")
    slots, generator = slots_of(), torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    leaves, found = [draw(B, T, H, 10).requires_grad_(), draw(B * T * K, H, 4).requires_grad_()], []
    for function in (
        lambda x, own: memories.side_by_side(WIDTHS, x, own, {"v"}, slots, of_tokens=True),
        lambda x, own: plain(x, own, {"v"}, slots, True),
    ):
        first = torch.autograd.grad(function(*leaves).pow(3).sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    torch.testing.assert_close(*found, rtol=1e-13, atol=1e-13)


def test_what_needs_no_gradient_gets_none() -> None:
    slots = slots_of()
    x, own = torch.randn(B, T, H, 10), torch.randn(B * T * K, H, 4)
    for of_x, of_own in itertools.product([True, False], repeat=2):
        leaves = [x.detach().requires_grad_(of_x), own.detach().requires_grad_(of_own)]
        found = memories.side_by_side(WIDTHS, *leaves, {"v"}, slots, of_tokens=True)
        assert found.requires_grad == (of_x or of_own)
        if found.requires_grad:
            found.sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [of_x, of_own]


@pytest.mark.parametrize("limit", [None, 2], ids=["all", "dropped"])
def test_biases_of_each_slots_memory(limit: int | None) -> None:
    slots, generator = slots_of(limit), torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    table = [Projection("k", 3, True), Projection("w", 1), Projection("v", 2, True)]
    x_MHW = draw(B * T * K, H, 6).requires_grad_()
    w = {f"memory_{p.name}_bias": draw(H, E, p.width).requires_grad_() for p in table if p.bias}
    found = memories._biased(table, x_MHW, w, slots)
    full_HEW = torch.cat([w["memory_k_bias"], torch.zeros(H, E, 1), w["memory_v_bias"]], -1)
    padded_HFW = torch.cat([full_HEW, torch.zeros(H, 1, 6)], 1)  # of no memory
    expected = x_MHW + padded_HFW.transpose(0, 1)[slots.memory]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    leaves, direction = [x_MHW, *w.values()], draw(*found.shape)
    for got, wanted in zip(
        torch.autograd.grad((found * direction).sum(), leaves),
        torch.autograd.grad((expected * direction).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-14, atol=1e-14)
    if limit:
        assert (slots.memory == E).any(), "none was dropped"
    else:
        assert memories._biased([Projection("w", 1)], x_MHW[..., :1], w, slots).shape == (B * T * K, H, 1)


@pytest.mark.parametrize("shared_memory", [True, False])
def test_a_mixer_that_is_gated_whatever_its_options_say(shared_memory: bool) -> None:
    """Its gate is one of what a memory gets, too: outputs are those of the definition."""

    class AlwaysGated(lsm.get("gla")):  # type: ignore[misc]
        def output_projections(self) -> tuple[Projection, ...]:
            return (Projection("g", self.cfg.head_v_dim),)

    registry._MIXERS["mom_always_gated"] = mom.mixture(AlwaysGated)
    try:
        inputs = make("mom_always_gated", {"shared_memory": shared_memory}, tokens=12)
        whole, _ = inputs.mix()
        parts, state = [], None
        for start in range(12):
            o, state = inputs.tokens(start, start + 1).mix(state=state)
            parts.append(o)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
    finally:
        del registry._MIXERS["mom_always_gated"]

"""Segments of every mixer: what runs of tokens do to a memory composes, in any bracketing, and can be forgotten."""

import dataclasses

import pytest
import torch
from torch import Tensor

from linear_moe.kernels import Segment
from linear_moe.lsm import MixerState
from tests.contract.cases import DISTINCT, Inputs, assert_close, gradients, make

DOCUMENTS = torch.tensor([0, 0, 5, 6, 20, 20])
PIECES = ((0, 1), (1, 9), (9, 20))

no_conv = {"conv_size": 0}


def segments(inputs: Inputs, cu_seqlens: Tensor | None = None) -> tuple[Segment, ...]:
    """Those that :meth:`Mixer.mix` hands to context parallelism."""
    seen: list[tuple[Segment, ...]] = []

    def keep(found):
        seen.append(tuple(found))
        return tuple(torch.zeros_like(segment.state) for segment in found)

    inputs.mix(state=_places(inputs), memory_from=keep, cu_seqlens=cu_seqlens)
    return seen[0]


def piece_of(inputs: Inputs, start: int, end: int) -> Inputs:
    """Some of the tokens, which know their places in the document and nothing else of those before them."""
    length = None
    if inputs.mixer.uses_positions:
        length = torch.full((len(inputs.x),), start) + (inputs.state.length if inputs.state else 0)
    return dataclasses.replace(inputs.tokens(start, end), state=MixerState((), length=length))


def _places(inputs: Inputs) -> MixerState:
    return MixerState((), length=inputs.state.length if inputs.state else None)


def named(segment: Segment) -> dict[str, Tensor]:
    tensors = {"state": segment.state, "decay": segment.decay, "log_decay": segment.log_decay}
    return {name: x for name, x in tensors.items() if x is not None}


@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.parametrize("cu_seqlens", [None, DOCUMENTS], ids=["rows", "packed"])
def test_carry_is_the_final_memory(name, cu_seqlens):
    """Of the scan, and with the scan's gradients; a run of no tokens changes nothing."""
    runs = 2 if cu_seqlens is None else len(DOCUMENTS) - 1
    inputs = make(name, no_conv, batch=2 if cu_seqlens is None else 1, tokens=20, runs=runs)
    before = inputs.state.memory
    after = inputs.mix(cu_seqlens=cu_seqlens)[1].memory
    found = segments(inputs, cu_seqlens)
    for i, (segment, start, end) in enumerate(zip(found, before, after, strict=True)):
        assert_shapes(segment, inputs, i, runs)
        carried = segment.carry(start)
        leaves = {key: x for key, x in inputs.tensors().items() if key != "conv"}
        assert_close(
            {"memory": carried} | gradients({"memory": carried}, leaves),
            {"memory": end} | gradients({"memory": end}, leaves),
        )
        if cu_seqlens is not None:
            assert torch.equal(carried[0], start[0]) and torch.equal(carried[-1], start[-1])


def assert_shapes(segment: Segment, inputs: Inputs, i: int, runs: int) -> None:
    num_keys, num_values = inputs.mixer.memory_shapes()[i]
    heads = inputs.mixer.cfg.num_heads
    assert segment.state.shape == (runs, heads, num_keys, num_values)
    dense = inputs.mixer.family in ("delta rule", "diagonal plus low rank")
    assert (segment.decay is not None) == dense, "the family says how a segment decays"
    if dense:
        assert segment.decay.shape == (runs, heads, num_keys, num_keys)
    elif segment.log_decay is not None:
        torch.broadcast_to(segment.log_decay, segment.state.shape)
        assert segment.log_decay.shape[:2] == (runs, heads)
        assert not (segment.log_decay > 0).any()


@pytest.mark.parametrize("name", DISTINCT)
def test_segments_compose(name):
    """Three pieces of a run, one of a single token: in either bracketing they are the run."""
    inputs = make(name, no_conv, tokens=20)
    pieces = [segments(piece_of(inputs, *piece)) for piece in PIECES]
    for whole, a, b, c in zip(segments(inputs), *pieces, strict=True):
        truth = named(whole)
        assert_close(named(a.then(b).then(c)), truth)
        assert_close(named(a.then(b.then(c))), truth)


@pytest.mark.parametrize("name", DISTINCT)
def test_segments_forget(name):
    """A memory that is reset before a piece: nothing earlier is left, however the pieces are composed."""
    inputs = make(name, no_conv, tokens=20, runs=2)
    reset = torch.tensor([False, True])
    pieces = [segments(piece_of(inputs, *piece)) for piece in PIECES]
    late = piece_of(inputs, 9, 20).mix()[1].memory
    whole = inputs.mix()[1].memory
    for i, (a, b, c) in enumerate(zip(*pieces, strict=True)):
        truth = {"memory": torch.where(reset[:, None, None, None], late[i], whole[i])}
        forgetful = c.forgetting(reset)
        before = inputs.state.memory[i]
        assert_close({"memory": forgetful.carry(b.carry(a.carry(before)))}, truth)
        assert_close({"memory": a.then(b).then(forgetful).carry(before)}, truth)
        assert_close({"memory": a.then(b.then(forgetful)).carry(before)}, truth)
        (grad,) = torch.autograd.grad(a.then(b).then(forgetful).carry(before)[1].sum(), before)
        assert not grad.any()


@pytest.mark.parametrize("name", DISTINCT)
def test_memory_from_starts_the_scan(name):
    """``mix`` with a memory told by segments is ``mix`` started from it."""
    inputs = make(name, runs=2)
    state = inputs.state
    told = inputs.mix(state=dataclasses.replace(state, memory=()), memory_from=lambda found: state.memory)
    truth = inputs.mix()
    assert torch.equal(told[0], truth[0])
    assert all(torch.equal(a, b) for a, b in zip(told[1].memory, truth[1].memory, strict=True))

"""Every mixer against its token loop: outputs, final memory and every gradient, started, packed, padded and decoded."""

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from linear_moe.lsm import MixerState, split
from tests.contract.cases import (
    DISTINCT,
    EVERY_CASE,
    MEMORY_CASES,
    Inputs,
    assert_close,
    error,
    gradients,
    make,
    mixer_class,
    options,
    outputs,
)
from tests.contract.loop import loop
from tests.parallel import ranks

DOCUMENTS = torch.tensor([0, 0, 1, 3, 38, 38, 48, 48], dtype=torch.int32)
"""Empty documents at both ends and inside, some shorter than the convolution, one longer than a chunk."""

PLAIN = [name for name in DISTINCT if not mixer_class(name).uses_hidden]
"""The members of a mixture are those of its inner mixer."""


@pytest.mark.parametrize("name, case", EVERY_CASE)
def test_mix_is_the_loop(name, case):
    """Started from a memory and a convolution tail, over more tokens than a chunk of the kernels."""
    inputs = make(name, case, batch=2, tokens=67, runs=2)
    truth, found = outputs(loop(inputs)), outputs(inputs.mix())
    leaves = inputs.tensors()
    assert_close(found | gradients(found, leaves), truth | gradients(truth, leaves))


@pytest.mark.parametrize("name, case", MEMORY_CASES)
def test_packed_documents_are_the_loop_over_each(name, case):
    inputs = make(name, case, batch=1, tokens=48, runs=len(DOCUMENTS) - 1)
    truth, found = outputs(loop(inputs, DOCUMENTS)), outputs(inputs.mix(cu_seqlens=DOCUMENTS))
    leaves = inputs.tensors()
    assert_close(found | gradients(found, leaves), truth | gradients(truth, leaves))


@pytest.mark.parametrize("name", DISTINCT)
def test_no_state_is_an_empty_one(name):
    inputs = make(name, runs=2)
    empty = _each(inputs.state, torch.zeros_like)
    assert_close(outputs(inputs.mix(state=None)), outputs(inputs.mix(state=empty)), 0.0)


@pytest.mark.parametrize("name", DISTINCT)
def test_the_state_matters(name):
    """Else the other tests would pass on a mixer that forgets at once: outputs, after some tokens, see the state."""
    inputs = make(name, tokens=12, runs=2)
    started, empty = inputs.mix()[0], inputs.mix(state=None)[0]
    assert error(started[:, :1], empty[:, :1]) > 1e-3
    assert error(started[:, 6:], empty[:, 6:]) > 1e-6


@pytest.mark.parametrize("name", PLAIN)
def test_scan_and_segment_of_gates(name):
    """The members themselves, on what ``gates`` makes: scan is reference, and both leave what segment says."""
    inputs = make(name, {"conv_size": 0}, tokens=20, runs=2)
    mixer, gated = inputs.mixer, _gates(inputs)
    o, memory = mixer.scan(state=inputs.state.memory, cu_seqlens=None, **gated)
    o_true, memory_true = mixer.reference(state=inputs.state.memory, cu_seqlens=None, **gated)
    assert_close({"o": o, **_named(memory)}, {"o": o_true, **_named(memory_true)})
    carried = [
        s.carry(m) for s, m in zip(mixer.segment(cu_seqlens=None, **gated), inputs.state.memory, strict=True)
    ]
    assert_close(_named(carried), _named(memory_true))


@pytest.mark.parametrize("name, case", [pair for pair in EVERY_CASE if pair[0] in PLAIN])
def test_gates_are_of_one_token(name, case):
    """Else decoding and context parallelism would differ: the gates of some tokens do not see the others."""
    inputs = make(name, options(name)[case] | {"conv_size": 0}, tokens=9)
    whole, part = _gates(inputs), _gates(inputs.tokens(3, 5), length=3)
    assert whole.keys() == part.keys()
    for key, x in whole.items():
        assert torch.equal(x[:, 3:5] if x.ndim > 2 and x.shape[1] == 9 else x, part[key]), key


def _gates(inputs: Inputs, length: int = 0) -> dict[str, Tensor]:
    """Of tokens that come after ``length`` others."""
    p, _ = split.split(inputs.mixer, inputs.x, inputs.others, inputs.w, inputs.place, MixerState(()), None)
    if inputs.mixer.uses_positions:
        p["positions"], _ = split.positions(inputs.x, torch.full((len(inputs.x),), length), None)
    return inputs.mixer.gates(p, inputs.w, inputs.place)


def _named(memory) -> dict[str, Tensor]:
    return {f"memory {i}": m for i, m in enumerate(memory)}


@pytest.mark.parametrize("name", DISTINCT)
def test_documents_are_as_if_alone(name):
    """Nothing passes from one document to another, bit for bit in what they see: gradients of others are zero."""
    inputs = make(name, batch=1)
    o, state = inputs.mix(cu_seqlens=DOCUMENTS)
    for n, (start, end) in enumerate(itertools.pairwise(DOCUMENTS.tolist())):
        if start == end:
            assert not any(memory[n].any() for memory in state.memory)
            continue
        alone, alone_state = inputs.tokens(start, end).mix()
        truth = {"o": alone} | _named(alone_state.memory)
        assert_close({"o": o[:, start:end]} | _named(m[n : n + 1] for m in state.memory), truth)
        for x in (inputs.x, *[x for x in inputs.others.values() if x.is_floating_point()]):
            (grad,) = torch.autograd.grad(o[:, start:end].sum(), x, retain_graph=True)
            assert not grad[:, :start].any() and not grad[:, end:].any()


@pytest.mark.parametrize("name", DISTINCT)
@pytest.mark.parametrize("pad", [1, 2, 17])
def test_left_padding_is_invisible(name, pad):
    """A left pad is a document before the text."""
    padded = make(name, batch=1, tokens=pad + 20)
    text = padded.tokens(pad, pad + 20)
    o, state = padded.mix(cu_seqlens=torch.tensor([0, pad, pad + 20]))
    assert_close(outputs((o[:, pad:], _each(state, lambda x: x[1:]))), outputs(text.mix()))


def _each(state: MixerState, change: Callable[[Tensor], Tensor]) -> MixerState:
    """Every tensor of a state changed."""
    others = (state.conv, state.group_conv, state.hidden, state.length)
    memory = tuple(change(m) for m in state.memory)
    return MixerState(memory, *(None if x is None else change(x) for x in others))


@pytest.mark.parametrize("name, case", MEMORY_CASES)
def test_decoding_is_prefill(name, case):
    """One token at a time, and in pieces of odd sizes, one of them longer than a chunk of the kernels."""
    inputs = make(name, case, tokens=82, runs=2)
    truth = outputs(inputs.mix())
    for sizes in ([1] * 10, [1, 2, 65, 3, 11]):
        state, start, pieces = inputs.state, 0, []
        for size in sizes:
            piece = inputs.tokens(start, start + size)
            o, state = dataclasses.replace(piece, state=state).mix()
            pieces.append(o)
            start += size
        if start == 82:
            assert_close(outputs((torch.cat(pieces, 1), state)), truth)
        else:
            assert_close({"o": torch.cat(pieces, 1)}, {"o": truth["o"][:, :start]})


@pytest.mark.parametrize("name", DISTINCT)
def test_heads_are_independent(name):
    """Tensor parallelism in one process: two halves of the heads, each placed, give the whole."""
    inputs = make(name, runs=2)
    o, state = inputs.mix()
    per_head = {table.name for table in inputs.mixer.all_parameters() if table.per_head}
    halves = [_heads(inputs, first, per_head) for first in (0, 2)]
    if inputs.mixer.num_norm_groups < 4 and inputs.mixer.cfg.output_norm != "identity":
        # The norm needs the other half: two threads that add up what they have.
        results = ranks.on_ranks(2, lambda group: _with_sum(halves[group.rank()], group).mix())
    else:
        results = [half.mix() for half in halves]
    for first, (o_half, state_half) in zip((0, 2), results):
        here = slice(first, first + 2)
        memory = _named(m[:, here] for m in state.memory)
        assert_close({"o": o_half} | _named(state_half.memory), {"o": o[:, :, here]} | memory)


def _heads(inputs: Inputs, first: int, per_head: set[str]) -> Inputs:
    """Two of the four heads, as a tensor-parallel rank has them."""
    here = slice(first, first + 2)
    place = dataclasses.replace(inputs.place, num_heads=2, first_head=first)
    groups = inputs.mixer.groups_here(place)
    whole = ("hidden", "memory_weight", "memory_index")
    shards = {key: groups if key == "groups" else here for key in inputs.others if key not in whole}
    conv, group_conv = inputs.state.conv, inputs.state.group_conv
    state = dataclasses.replace(
        inputs.state,
        memory=tuple(m[:, here] for m in inputs.state.memory),
        conv=None if conv is None else conv[:, :, here],
        group_conv=None if group_conv is None else group_conv[:, :, groups],
    )
    return dataclasses.replace(
        inputs,
        x=inputs.x[:, :, here],
        others=inputs.others | {k: inputs.others[k][:, :, s] for k, s in shards.items()},
        w={key: x[here] if key in per_head else x for key, x in inputs.w.items()},
        state=state,
        place=place,
    )


def _with_sum(half: Inputs, group: ranks.ThreadGroup) -> Inputs:
    place = dataclasses.replace(half.place, sum_over_ranks=lambda x: ranks.all_gather(x, group).sum(0))
    return dataclasses.replace(half, place=place)

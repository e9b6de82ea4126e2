"""Context parallelism of every mixer in one process: outputs and all gradients of 2, 3, 4 and 8 ranks are those of one.

Zigzag runs the layer's own code on ranks that are threads (``tests/parallel/ranks.py``); contiguous cuts, which
Megatron does not have, show that segments know nothing of the layout.
"""

import itertools
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.kernels import Segment
from linear_moe.lsm import MixerState
from linear_moe.model.mixer_layer import MixerLayer
from linear_moe.parallel import halo, lasp2
from linear_moe.parallel.layout import SequenceLayout
from tests.contract.cases import (
    BRIEF,
    DISTINCT,
    MIXTURES,
    Inputs,
    assert_close,
    error,
    gradients,
    make,
    options,
)
from tests.parallel import ranks

LENGTH = 48  # at 8 ranks a chunk has 3 tokens: what a convolution of width 4 looks back
DOCUMENTS = torch.tensor([[0, 1, 2, 13, 41, 48, 48], [0, 0, 24, 24, 36, 38, 48]], dtype=torch.int32)
"""Edges on chunks and inside them, short documents, one over many chunks, empty ones."""


def cases(narrow: int, mixtures: tuple[int, ...], brief: int) -> list[Any]:
    """Mixer, options, number of ranks and whether packed: everything with the defaults, see ``cases.py`` for the rest.

    Another width of the convolution runs on ``narrow`` ranks, the mixtures with all checks on ``mixtures`` and the
    others on ``brief``.
    """
    sizes = {name: mixtures if name in MIXTURES else (2, 3, 4, 8) for name in DISTINCT}
    found = [(name, "defaults", n, packed) for name in sizes for n in sizes[name] for packed in (False, True)]
    found += [(name, "bias_conv", narrow, True) for name in DISTINCT if "bias_conv" in options(name)]
    found += [(name, "defaults", brief, True) for name in BRIEF]
    return [pytest.param(*case, id="-".join(map(str, case[:3])) + "-packed" * case[3]) for case in found]


@cache
def inputs_of(name: str, case: str) -> Inputs:
    return make(name, case, batch=2, tokens=LENGTH)


@cache
def one_rank(name: str, case: str, packed: bool) -> dict[str, Tensor]:
    """Outputs and gradients without context parallelism, which other tests hold against the token loop."""
    inputs = inputs_of(name, case)
    layout = SequenceLayout(2, LENGTH, cu_seqlens=DOCUMENTS if packed else None)
    return results(inputs, local(inputs, layout, None))


def results(inputs: Inputs, o: Tensor) -> dict[str, Tensor]:
    return {"o": o, **gradients({"o": o}, inputs.tensors())}


def local(inputs: Inputs, layout: SequenceLayout, group: object) -> Tensor:
    """What :class:`MixerLayer` does on one rank between its projections, ``[B, T, H, V]``."""
    layer = SimpleNamespace(mixer=inputs.mixer, place=inputs.place, cp_group=group, weights=lambda: inputs.w)
    layer._state_before = partial(MixerLayer._state_before, layer)
    others = [layout.take(x) for x in inputs.others.values()]
    return MixerLayer._mix(layer, layout, tuple(inputs.others), layout.take(inputs.x), *others)


@pytest.fixture(autouse=True)
def threads_for_ranks(monkeypatch):
    monkeypatch.setattr(halo, "all_gather", ranks.all_gather)
    monkeypatch.setattr(lasp2, "start_all_gather", ranks.start_all_gather)


@pytest.mark.parametrize("name, case, cp_size, packed", cases(narrow=8, mixtures=(2, 8), brief=4))
def test_zigzag_is_one_rank(name, case, cp_size, packed):
    inputs = inputs_of(name, case)
    cut = [SequenceLayout(2, LENGTH, cp_size, r, DOCUMENTS if packed else None) for r in range(cp_size)]
    pieces = ranks.on_ranks(cp_size, lambda group: local(inputs, cut[group.rank()], group))
    chunks = torch.stack([o.unflatten(1, (2, -1)) for o in pieces])
    o = cut[0].natural_order(chunks).movedim(0, 1).flatten(1, 2)
    assert_close(results(inputs, o), one_rank(name, case, packed))


@pytest.mark.parametrize("name", DISTINCT)
def test_chunks_need_what_ranks_send(name):
    """Else the tests above would pass without any communication."""
    inputs = inputs_of(name, "defaults")
    alone = [inputs.tokens(start, start + 6).mix()[0] for start in range(0, LENGTH, 6)]
    assert error(torch.cat(alone, 1), one_rank(name, "defaults", False)["o"]) > 1e-3


@pytest.mark.parametrize("name, case, size, packed", cases(narrow=8, mixtures=(3,), brief=3))
def test_contiguous_is_one_rank(name, case, size, packed):
    """Ranks one after another; each folds the segments of those before it, in both ways that are equal."""
    inputs = inputs_of(name, case)
    documents = DOCUMENTS.tolist() if packed else [[0, LENGTH]] * 2
    rows = [_contiguous(inputs, b, boundaries, size) for b, boundaries in enumerate(documents)]
    assert_close(results(inputs, torch.cat(rows)), one_rank(name, case, packed))


def _contiguous(inputs: Inputs, b: int, boundaries: list[int], size: int) -> Tensor:
    """Sequence ``b``, its documents packed, on ``size`` ranks of equal length."""
    others = {name: x[b : b + 1] for name, x in inputs.others.items()}
    row = replace(inputs, x=inputs.x[b : b + 1], others=others)
    done: list[list[list[Segment]]] = []
    pieces = []
    for start in range(0, LENGTH, LENGTH // size):
        end = start + LENGTH // size
        cut = torch.tensor(boundaries).clamp(start, end) - start
        nonempty = [n for n in range(len(cut) - 1) if cut[n] < cut[n + 1]]
        is_first = torch.arange(len(cut) - 1) == nonempty[0]
        continued = is_first if boundaries[nonempty[0]] < start else torch.zeros_like(is_first)
        resets = torch.tensor([boundaries[nonempty[-1]] >= start])

        calls = itertools.count()  # a mixture of memories first asks for the tails of its convolutions

        def memory_from(found, continued=continued, last=nonempty[-1], resets=resets, calls=calls):
            asked = next(calls)
            if asked == len(done):
                done.append([])
            before = [_fold([segments[i] for segments in done[asked]], found[i]) for i in range(len(found))]
            done[asked].append([_run(segment, last).forgetting(resets) for segment in found])
            return tuple(continued[:, None, None, None] * memory for memory in before)

        conv = group_conv = length = None
        document = boundaries[nonempty[0]]
        if row.mixer.conv_channels and not row.mixer.uses_hidden:
            convolved = row.mixer.conv_input(row.x, row.w)
            conv = is_first[:, None, None, None] * _inputs_before(row, convolved, start, document)
        if row.mixer.group_conv_channels:
            convolved = row.others["groups"][..., : row.mixer.group_conv_channels]
            group_conv = is_first[:, None, None, None] * _inputs_before(row, convolved, start, document)
        if row.mixer.uses_positions:
            length = is_first * max(start - document, 0)
        state = MixerState((), conv, group_conv, length=length)
        pieces.append(row.tokens(start, end).mix(state=state, memory_from=memory_from, cu_seqlens=cut)[0])
    return torch.cat(pieces, 1)


def _fold(segments: list[Segment], like: Segment) -> Tensor:
    """The memory after ``segments``, by ``carry`` and by ``then``."""
    if not segments:
        return torch.zeros_like(like.state[:1])
    memory, composed = segments[0].state, segments[0]
    for segment in segments[1:]:
        memory, composed = segment.carry(memory), composed.then(segment)
    assert error(composed.state, memory) < 1e-12
    return memory


def _run(segment: Segment, n: int) -> Segment:
    fields = (segment.state, segment.log_decay, segment.decay)
    return Segment(*[None if x is None else x[n : n + 1] for x in fields])


def _inputs_before(row: Inputs, convolved_BTHC: Tensor, start: int, document: int) -> Tensor:
    """Inputs of the convolution before ``start``, ``[W - 1, H, C]``; zero before the start of the document."""
    head_THC = convolved_BTHC[0]
    positions = range(start - row.mixer.cfg.conv_size + 1, start)
    return torch.stack([head_THC[t] if t >= document else torch.zeros_like(head_THC[0]) for t in positions])

"""Token shift and the first layer's value: what projections read, layers over packed documents, the first of its kind.

The other tests take ``Mixer.inputs`` as it is; here it has its definition, one token at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from linear_moe.lsm import MixerState, split
from tests.contract import layers
from tests.contract.cases import EVERY_CASE, MIXERS, PLACE, assert_close, error, gradients, make, mixer_class
from tests.contract.layers import BATCH, DOCUMENTS, LENGTH, Layout
from tests.contract.test_contract_layer import whole

SHIFTED = [name for name in MIXERS if mixer_class(name).token_shift]
HANDED_ON = [name for name in MIXERS if mixer_class(name).first_value is not None]
RUNS = torch.tensor([0, 0, 1, 4, 9, 9])


def rwkv6(x: Tensor, before: Tensor, w) -> dict[str, Tensor]:
    """arXiv:2404.05892, section 3: ddlerp, of receptance, decay, key, value and gate."""
    difference = before - x
    waist = torch.tanh(w["x_down"] @ (x + difference * w["x_mu"]))
    ranks = waist.chunk(len(w["x_up"]))
    mix = [up @ part + bias for up, part, bias in zip(w["x_up"], ranks, w["x_bias"], strict=True)]
    return {name: x + difference * m for name, m in zip("qwkvg", mix)}


def rwkv7(x: Tensor, before: Tensor, w) -> dict[str, Tensor]:
    """arXiv:2503.14456, section 4.1: lerp; value and its share of the first one read the same."""
    of = {"q": "r", "w": "w", "k": "k", "v": "v", "mix": "v", "a": "a", "g": "g"}
    return {
        ours: (1 - w[f"x_{letter}"]) * x + w[f"x_{letter}"] * before
        for ours, letter in of.items()
        if f"x_{letter}" in w
    }


DEFINITIONS: dict[str, Callable[..., dict[str, Tensor]]] = {"rwkv6": rwkv6, "rwkv7": rwkv7}


def test_every_token_shift_has_its_definition():
    assert set(SHIFTED) == set(DEFINITIONS)


@pytest.mark.parametrize("name, case", [pair for pair in EVERY_CASE if pair[0] in DEFINITIONS])
def test_inputs(name, case):
    """With every gradient; each projection of the table is told what it reads."""
    inputs = make(name, case, tokens=1)
    mixer, w = inputs.mixer, inputs.w
    x, before = (torch.randn(2, 3, mixer.cfg.hidden_size).double().requires_grad_() for _ in range(2))
    found = mixer.inputs(x, before, w)
    assert set(found) == {p.name for p in mixer.all_projections()}
    truth = {key: torch.zeros_like(x) for key in found}
    for b, t in itertools.product(range(2), range(3)):
        for key, value in DEFINITIONS[name](x[b, t], before[b, t], w).items():
            if key in truth:
                truth[key][b, t] = value
    leaves = {"x": x, "before": before} | {key: value for key, value in w.items() if key.startswith("x_")}
    assert_close(found | gradients(found, leaves), truth | gradients(truth, leaves))


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_token_before(packed, started):
    """Zero, or what was kept, before the first token of a run; an empty run keeps what it had."""
    bounds = RUNS.tolist() if packed else [0, 9]
    x = torch.randn(1, 9, 4).double()
    kept = torch.randn(len(bounds) - 1, 1, 4).double() if started else torch.zeros(len(bounds) - 1, 1, 4)
    state = MixerState((), hidden=kept) if started else None
    before, last = split.token_before(x, state, RUNS if packed else None)
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        history = torch.cat([kept[n], x[0, start:end]])
        assert torch.equal(before[0, start:end], history[:-1])
        assert torch.equal(last[n], history[-1:])


def documents(name: str) -> dict[str, Tensor]:
    """A layer's output over packed documents, and over each on its own."""
    from megatron.core.packed_seq_params import PackedSeqParams

    layer = layers.build(name, Layout(1))
    layers.fill(layer, Layout(1))
    hidden = torch.randn(LENGTH, BATCH, 16, dtype=torch.float64)
    first = layers.first_value(layer, Layout(1))
    cu_seqlens = torch.tensor(DOCUMENTS, dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="sbhd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)
    together, alone = layer(hidden, packed_seq_params=packed)[0], torch.zeros_like(hidden)
    for b, bounds in enumerate(DOCUMENTS):
        for start, end in itertools.pairwise(bounds):
            if start < end:
                layer.first_value.x_BTHV = None if first is None else first[b : b + 1, start:end]
                alone[start:end, b : b + 1] = layer(hidden[start:end, b : b + 1])[0]
    return {"together": together.detach(), "alone": alone.detach()}


@pytest.fixture(scope="module")
def packed(_pool):
    return _pool.run(1, layers.alone, SHIFTED, documents)[0]


@pytest.mark.parametrize("name", SHIFTED)
def test_shift_stays_in_its_document(packed, name):
    """In a whole layer: what every layout is compared with could look back alike in all of them."""
    assert isinstance(packed[name], dict), packed[name]
    assert error(packed[name]["together"], packed[name]["alone"]) < 1e-12


PLAIN = {"conv_size": 0, "qkv_bias": True}
"""As RWKV is by default, with biases: its projections never lie side by side."""


def plain(name: str) -> dict[str, dict[str, Tensor]]:
    """A layer by hand, and step by step."""
    with patch.dict(layers.IN_MODEL, {name: PLAIN}):
        return {"by hand": layers.by_hand(name), "decoded": layers.decode(name)}


@pytest.mark.parametrize("name", SHIFTED)
def test_layers_without_a_convolution(gloo, name):
    """As their definition, step by step, and over ranks."""
    found = gloo(1, layers.alone, [name], plain)[0][name]
    assert isinstance(found, dict), found
    for outcome in found.values():
        first, second = outcome.values()
        assert error(first, second) < 1e-10
    layout, single = Layout(4, tp=2, sp=True, cp=2, packed=True), Layout(1, packed=True)
    ranks, alone = (gloo(each.world, layers.run_with, name, PLAIN, each) for each in (layout, single))
    assert isinstance(alone[0], dict) and isinstance(ranks[0], dict), (alone[0], ranks[0])
    assert_close(whole(ranks, layout), whole(alone, single))


def first_layer(name: str) -> dict[str, Any]:
    """The layer that hands its value on: what it owns, what has a gradient, what it leaves."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from linear_moe.model.mixer_layer import MixerLayer

    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    config = layers.config_of(name, Layout(1))
    made = {}
    for number in (1, 2):
        layer = MixerLayer(config, layer_number=number, mixer=name, pg_collection=groups)
        layers.fill(layer, Layout(1))
        made[number] = layer
    first, later = made[1], made[2]
    later.share(None, first.first_value)
    hidden = torch.randn(LENGTH, BATCH, 16, dtype=torch.float64)
    out = first(hidden)[0]
    value = first.first_value.x_BTHV
    value.retain_grad()
    (out + later(hidden)[0]).sum().backward()
    mixer, w = first.mixer, first.weights()
    hidden_BTD = hidden.transpose(0, 1)
    before = torch.nn.functional.pad(hidden_BTD, (0, 0, 1, -1))
    read = mixer.inputs(hidden_BTD, before, w)[mixer.first_value]
    weight_HVD = first._found()[f"in_proj.{mixer.first_value}"]
    truth = torch.einsum("btd,hvd->bthv", read, weight_HVD) + getattr(first, f"{mixer.first_value}_bias", 0)
    return {
        "keys": {number: [key for key, _ in layer.named_parameters()] for number, layer in made.items()},
        "unused": [key for key, p in first.named_parameters() if p.grad is None or not p.grad.any()],
        "value": value.detach(),
        "truth": truth.detach(),
        "grad": value.grad,
    }


@pytest.mark.parametrize("name", HANDED_ON)
def test_first_layer(gloo, name):
    """It owns nothing without a use, which would hold up Megatron's gradient buckets, and later layers read it."""
    (seen,) = gloo(1, layers.alone, [name], first_layer)
    seen = seen[name]
    assert isinstance(seen, dict), seen
    assert not seen["unused"]
    absent = {p.name for p in layers.tables(name).low_rank_projections() if p.after_first}
    missing = set(seen["keys"][2]) - set(seen["keys"][1])
    assert absent and {key.split(".")[1] for key in missing} == absent
    assert set(seen["keys"][1]) < set(seen["keys"][2])
    assert error(seen["value"], seen["truth"]) < 1e-12
    assert seen["grad"].abs().max() > 1e-6


@pytest.mark.parametrize("name", HANDED_ON)
def test_first_layer_keeps_its_value(name):
    """Without a first value there is nothing to mix: as if the share were zero."""
    inputs = make(name, tokens=5)
    place = dataclasses.replace(inputs.place, layer=0, layer_of_kind=0)
    table = {p.name for p in inputs.mixer.low_rank_projections() if p.after_first}
    others = {key: x for key, x in inputs.others.items() if key not in table and not key.startswith("first_")}
    found, _ = dataclasses.replace(inputs, others=others, place=place).mix()
    closed = {key: torch.full_like(x, -1e4) if key in table else x for key, x in inputs.others.items()}
    truth, _ = dataclasses.replace(inputs, others=closed).mix()
    assert error(found, truth) < 1e-12
    assert error(found, inputs.mix()[0]) > 1e-3


def test_rwkv7_starts_alike_on_every_rank():
    """Heads of a tensor-parallel rank start as in the whole; directions by chance, sizes as in the whole."""
    inputs = make("rwkv7", "narrow")
    mixer, whole = inputs.mixer, started(inputs.mixer, inputs.place)
    for first in (0, 2):
        here = started(mixer, dataclasses.replace(inputs.place, num_heads=2, first_head=first))
        for key, x in here.items():
            if key.startswith("in_proj.") or key.endswith("up.weight"):
                size, of_whole = x.square().mean(), whole[key].square().mean()
                assert size.item() == pytest.approx(of_whole.item(), rel=1e-4), key
            elif key == "out_proj.weight":
                assert not x.any()
            else:
                dim = next((d for d in range(x.ndim) if x.shape[d] < whole[key].shape[d]), 0)
                part = whole[key]
                if x.shape != part.shape:
                    part = part.chunk(2, dim)[first // 2]
                assert torch.equal(x, part), key


@pytest.mark.parametrize(("layer", "of", "first"), [(0, 4, 0), (3, 4, 0), (1, 4, 2), (0, 1, 0)])
def test_rwkv6_starts_by_layer_and_channel(layer: int, of: int, first: int):
    """The authors' start, channel by channel: a token looks back, some channels forget at once and some never."""
    inputs = make("rwkv6", "narrow")
    cfg = inputs.mixer.cfg
    place = dataclasses.replace(inputs.place, num_heads=2, first_head=first, layer=layer, num_layers=of)
    found = started(inputs.mixer, place)
    depth, to_go = layer / max(of - 1, 1), 1 - layer / of
    for i in range(cfg.hidden_size):
        shift, half = (1 - (i / cfg.hidden_size) ** (power * to_go) for power in (1, 0.5))
        assert found["x_mu"][i].item() == pytest.approx(shift, abs=1e-6)
        each = [half, shift, shift, shift - 0.3 * depth, half]  # q, w, k, v, g
        assert found["x_bias"][:, i].tolist() == pytest.approx(each[: len(found["x_bias"])], abs=1e-6)
    width, last = cfg.head_k_dim, cfg.num_heads * cfg.head_k_dim - 1
    for i in range(2 * width):
        n = first * width + i
        decay = -6 + 5 * (n / last) ** (0.7 + 1.3 * depth)
        bonus = depth * (1 - n / last) + 0.1 * ((n + 1) % 3 - 1)
        assert found["low_rank.w.up.bias"][i].item() == pytest.approx(decay, abs=1e-5)
        assert found["bonus"].flatten()[i].item() == pytest.approx(bonus, abs=1e-5)


def started(mixer, place) -> dict[str, Tensor]:
    """What :meth:`Mixer.initialize` makes of a layer's parameters in ``place``."""
    torch.manual_seed(0)
    heads, hidden = place.num_heads, mixer.cfg.hidden_size
    empty = partial(torch.full, fill_value=9.0)
    found = {
        table.name: empty((heads, *table.shape[1:]) if table.per_head else table.shape)
        for table in mixer.all_parameters()
    }
    found |= {f"in_proj.{p.name}": empty((heads, p.width, hidden)) for p in mixer.fused_projections()}
    for p in mixer.low_rank_projections():
        found[f"low_rank.{p.name}.down"] = empty((p.rank, hidden))
        found[f"low_rank.{p.name}.up.weight"] = empty((heads * p.width, p.rank))
        if p.bias:
            found[f"low_rank.{p.name}.up.bias"] = empty((heads * p.width,))
    found["out_proj.weight"] = empty((hidden, heads * mixer.cfg.head_v_dim))
    mixer.initialize(found, place)
    return {key: x for key, x in found.items() if not key.startswith("norm_bias")}


@pytest.mark.parametrize("name", ["rwkv6", "rwkv7"])
def test_layers_start_so(gloo, name):
    """Built for two ranks: every parameter that a mixer starts by itself, as it says for the heads of the rank."""
    mixer = layers.tables(name)
    for rank, found in enumerate(gloo(2, layers.initial, [name], 2)):
        ours = {key: x for key, (_, x) in found[name].items()}
        place = dataclasses.replace(PLACE, num_heads=2, first_head=2 * rank)
        table = mixer.fused_projections()
        parts = ours["in_proj.weight"].unflatten(0, (2, -1)).split([p.width for p in table], dim=1)
        ours |= {f"in_proj.{p.name}": part for p, part in zip(table, parts)}
        expected = {key: x.double() for key, x in started(mixer, place).items() if not (x == 9).all()}
        assert len(expected) >= 4
        for key, x in expected.items():
            pair = [ours[key].double().reshape(x.shape), x]
            if key.startswith("in_proj.") or key.endswith(".up.weight"):  # any directions will do
                pair = [torch.linalg.svdvals(y.reshape(-1, x.shape[-1])) for y in pair]
            torch.testing.assert_close(
                *pair, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )

"""``MixerLayer`` of every mixer over gloo: layouts give one process's results, and checkpoints reshard."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract import layers
from tests.contract.cases import DISTINCT, MIXERS, assert_close, error
from tests.contract.layers import BATCH, LENGTH, Layout

LAYOUTS = {
    "tp2": Layout(2, tp=2),
    "tp2-sp": Layout(2, tp=2, sp=True),
    "cp2": Layout(2, cp=2),
    "cp2-packed": Layout(2, cp=2, packed=True),
    "tp4": Layout(4, tp=4),
    "tp4-sp": Layout(4, tp=4, sp=True),
    "tp2-sp-cp2-packed": Layout(4, tp=2, cp=2, sp=True, packed=True),
}


BRIEFLY = ("tp2-sp", "tp2-sp-cp2-packed")
"""Layouts that every mixture of memories runs in."""


@pytest.fixture(scope="module")
def ranks_of(_pool):
    """What every rank of a layout computed, by mixer; each layout runs once, all mixers in it."""
    cache: dict[Layout, list[dict[str, Any]]] = {}
    of_all = [Layout(1), Layout(1, packed=True), *(LAYOUTS[layout] for layout in BRIEFLY)]

    def of(layout: Layout, name: str) -> list[dict[str, Any]]:
        if layout not in cache:
            names = list(MIXERS) if layout in of_all else DISTINCT
            cache[layout] = _pool.run(layout.world, layers.run_all, names, layout)
        return [_or_fail(rank[name]) for rank in cache[layout]]

    return of


@pytest.fixture(scope="module")
def alone(_pool):
    """What one rank computed with ``fn``, by mixer; one run for all mixers."""
    cache: dict[Callable, dict[str, Any]] = {}

    def of(fn: Callable[[str], Any], name: str) -> Any:
        if fn not in cache:
            (cache[fn],) = _pool.run(1, layers.alone, list(MIXERS), fn)
        return _or_fail(cache[fn][name])

    return of


def _or_fail(found: Any) -> Any:
    """``found``, unless it is a traceback."""
    if isinstance(found, str):
        pytest.fail(found)
    return found


def whole(ranks: list[dict[str, Any]], layout: Layout) -> dict[str, Tensor]:
    """Outputs and gradients of the whole layer from the pieces; what should be copies must agree."""
    found: dict[str, Tensor] = {}
    for key in ranks[0]["tokens"]:
        chunks: dict[int, Tensor] = {}
        for cp in range(layout.cp):
            pieces = [rank["tokens"][key] for rank in ranks if rank["cp"] == cp]
            local = _copies(key, pieces) if not layout.sp else torch.cat(pieces)
            if layout.cp == 1:
                chunks[0] = local
            else:
                first, second = local.chunk(2)
                chunks |= {cp: first, 2 * layout.cp - 1 - cp: second}
        found[key] = torch.cat([chunks[c] for c in sorted(chunks)])
        assert found[key].shape == (LENGTH, BATCH, 16)
    for key, (dim, _) in ranks[0]["grads"].items():
        shards = []
        for tp in range(layout.tp):
            copies = [rank["grads"][key][1] for rank in ranks if rank["tp"] == tp]
            shards.append(_copies(key, copies))
        found[f"grad {key}"] = _copies(key, shards) if dim is None else torch.cat(shards, dim)
    return found


def _copies(key: str, pieces: list[Tensor]) -> Tensor:
    assert all(torch.equal(piece, pieces[0]) for piece in pieces), f"{key} differs between ranks"
    return pieces[0]


@pytest.mark.parametrize(
    "name, layout", [(n, layout) for n in MIXERS for layout in (LAYOUTS if n in DISTINCT else BRIEFLY)]
)
def test_layouts_are_one_process(ranks_of, name, layout):
    chosen = LAYOUTS[layout]
    single = Layout(1, packed=chosen.packed)
    assert_close(whole(ranks_of(chosen, name), chosen), whole(ranks_of(single, name), single))


@pytest.mark.parametrize("name", MIXERS)
def test_one_process_is_the_definition(alone, name):
    found = alone(layers.by_hand, name)
    assert error(found["found"], found["truth"]) < 1e-10


@pytest.mark.parametrize("name", MIXERS)
def test_every_parameter_learns(ranks_of, name):
    """Else a gradient that is zero on both sides would pass."""
    single = Layout(1)
    grads = ranks_of(single, name)[0]["grads"]
    assert all(grad.abs().max() > 1e-6 for _, grad in grads.values())


@pytest.mark.parametrize("name", MIXERS)
def test_shards_are_of_heads(ranks_of, name):
    """Which parameters tensor parallelism divides, and where: by the mixer's tables, not by Megatron's marks."""
    mixer = layers.tables(name)
    expected: dict[str, int | None] = {"in_proj.weight": 0, "out_proj.weight": 1}
    for p in mixer.low_rank_projections():
        expected |= {f"low_rank.{p.name}.down": None, f"low_rank.{p.name}.up.weight": 0}
        expected |= {f"low_rank.{p.name}.up.bias": 0} if p.bias else {}
    expected |= {"group_proj.weight": None} if mixer.grouped_width else {}
    expected |= {"first value": None} if mixer.first_value else {}
    for table in mixer.all_parameters():
        key = f"model_tables.{table.name}" if table.per_model else table.name
        expected[key] = 0 if table.per_head else None
    for rank in ranks_of(LAYOUTS["tp2-sp"], name):
        assert {key: dim for key, (dim, _) in rank["grads"].items()} == expected


def test_checkpoints_reshard_bit_for_bit(gloo, tmp_path):
    """Saved by one rank, loaded by two, then by four, then by one: bfloat16 and float32 parameters of every mixer."""
    steps = [1, 2, 4, 1]
    seen = gloo(4, layers.reshard, DISTINCT, steps, str(tmp_path), timeout=300.0)
    first = {name: seen[0]["0"][name] for name in DISTINCT}
    for i, tp in enumerate(steps):
        for name in DISTINCT:
            shards = [seen[rank][str(i)][name] for rank in range(tp)]
            for key, (dim, start) in first[name].items():
                pieces = [shard[key][1] for shard in shards]
                loaded = _copies(key, pieces) if dim is None else torch.cat(pieces, dim)
                assert loaded.dtype == start.dtype, (name, key)
                assert torch.equal(loaded, start), (name, key, tp)


def test_checkpoint_test_is_not_empty(gloo):
    """What that test loads into starts from other weights; shards differ from each other, and copies do not."""
    ranks = gloo(2, layers.initial, DISTINCT, 2)
    for name in DISTINCT:
        for key, (dim, shard) in ranks[0][name].items():
            other = ranks[1][name][key][1]
            is_constant = shard.numel() == 1 or bool((shard == shard.flatten()[0]).all())
            assert shard.isfinite().all()
            assert torch.equal(shard, other) == (dim is None or is_constant), (name, key)


@pytest.mark.parametrize("name", MIXERS)
def test_exact_parameters_stay_float32(alone, name):
    seen = alone(layers.half_precision, name)
    exact = {key for key, keep in seen["table"].items() if keep}
    assert exact <= set(seen["kept"]), "their values survive the cast to the bit"
    for cast in ("Float16Module", "bfloat16()", "half()", "built"):
        half = "float16" if cast == "half()" else "bfloat16"
        assert seen[cast] == {key: "float32" if key in exact else half for key in seen[cast]}, cast


@pytest.mark.parametrize("name", MIXERS)
def test_decoding_through_megatrons_context(alone, name):
    found = alone(layers.decode, name)
    assert error(found["pieces"], found["whole"]) < 1e-10

"""How tensors of Hugging Face become ours, number by number: where each row of theirs is in ours, and back.

A row is named by what it is, (part, head, channel), and holds a number of its own, so that a wrong place shows.
"""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe.checkpoint import transforms as t
from linear_moe.checkpoint.hf_folder import Stored
from linear_moe.checkpoint.parts import joined, members, split

COLUMNS = 3


class Rows:
    """Numbers for names, the same for the same name."""

    def __init__(self) -> None:
        self.numbers: dict[Any, int] = {}

    def __call__(self, names: Iterable[Any], *shape: int) -> Tensor:
        found = [self.numbers.setdefault(name, len(self.numbers)) for name in names]
        rows = torch.tensor(found, dtype=torch.float64)[:, None] * 10 + torch.arange(COLUMNS)
        return rows.reshape(*shape, COLUMNS) if shape else rows


def heads(part: str, count: int, width: int) -> list[Any]:
    return list(itertools.product([part], range(count), range(width)))


def check(transform: t.Transform, theirs: list[Tensor], ours: Tensor) -> None:
    """Both ways, and the shapes on the meta device."""
    found = transform.to_ours(theirs)
    assert found.shape == ours.shape and torch.equal(found, ours)
    back = transform.to_theirs(ours)
    assert len(back) == len(theirs)
    for a, b in zip(back, theirs, strict=True):
        assert a.shape == b.shape and torch.equal(a, b)
    shapes = [part.shape for part in transform.to_theirs(ours.to("meta"))]
    assert shapes == [part.shape for part in theirs]


@pytest.mark.parametrize(("groups", "queries", "channels"), [(1, 1, 2), (2, 1, 2), (2, 3, 4), (3, 2, 1)])
@pytest.mark.parametrize("gated", [False, True])
def test_query_key_value_by_group(groups: int, queries: int, channels: int, gated: bool):
    """Theirs has all query heads, each with its gate behind it; ours the queries of a group, their gates, k and v."""
    rows = Rows()
    kinds = ("q", "gate") if gated else ("q",)
    query = [(kind, h, c) for h in range(groups * queries) for kind in kinds for c in range(channels)]
    theirs = [rows(query), rows(heads("k", groups, channels)), rows(heads("v", groups, channels))]
    ours = []
    for g in range(groups):
        of_group = range(g * queries, (g + 1) * queries)
        ours += [(kind, h, c) for kind in kinds for h in of_group for c in range(channels)]
        ours += [(kind, g, c) for kind in "kv" for c in range(channels)]
    transform = (t.GatedGrouped if gated else t.Grouped)(groups, channels)
    check(transform, theirs, rows(ours))
    flat = [part[:, 0] for part in theirs]  # biases
    assert torch.equal(transform.to_ours(flat), rows(ours)[:, 0])


def test_the_vocabulary_gets_rows_of_zeros():
    table = torch.randn(5, COLUMNS)
    padded = t.Padded(rows=5, padded=8)
    found = padded.to_ours([table])
    assert torch.equal(found[:5], table) and not found[5:].any() and found.shape == (8, COLUMNS)
    assert torch.equal(padded.to_theirs(found)[0], table)
    assert t.Padded(8, 8).to_ours([found]) is found


def test_gate_and_up_are_halves():
    rows = Rows()
    check(
        t.Halves(),
        [rows(heads("gate", 1, 4)), rows(heads("up", 1, 4))],
        rows(heads("gate", 1, 4) + heads("up", 1, 4)),
    )


WIDTHS = {"q": 2, "k": 3, "v": 1}


def by_head(count: int, widths: dict[str, int]) -> list[Any]:
    return [(part, h, c) for h in range(count) for part, width in widths.items() for c in range(width)]


def test_projections_by_head():
    rows = Rows()
    theirs = [rows(heads(part, 4, width)) for part, width in WIDTHS.items()]
    check(t.ByHead(4, tuple(WIDTHS.values())), theirs, rows(by_head(4, WIDTHS)))


def test_taps_of_every_head():
    """Of a convolution ``[H * width, 1, taps]``, and of its bias."""
    rows = Rows()
    theirs = [rows(heads(part, 4, width), 4 * width, 1) for part, width in WIDTHS.items()]
    ours = rows(by_head(4, WIDTHS), 4, sum(WIDTHS.values()))
    transform = t.Taps(4, tuple(WIDTHS.values()))
    check(transform, theirs, ours)
    check(transform, [part[:, 0, 0] for part in theirs], ours[..., 0])


def test_gated_deltanet():
    """Theirs is ``[q k v g]`` and ``[b a]`` of each head, and a convolution over all of q, of k, of v."""
    rows, widths = Rows(), {"q": 2, "k": 2, "v": 6, "a": 3, "b": 3, "g": 6}
    main = by_head(4, {part: widths[part] for part in "qkvg"})
    small = by_head(4, {part: widths[part] for part in "ba"})
    check(t.DeltaProjections(4, 2, 6, 3), [rows(main), rows(small)], rows(by_head(4, widths)))
    convolved = {part: widths[part] for part in "qkv"}
    theirs = [name for part, width in convolved.items() for name in heads(part, 4, width)]
    ours = rows(by_head(4, convolved), 4, 10)
    check(t.DeltaTaps(4, 2, 6), [rows(theirs, 40, 1)], ours)


def test_one_tensor_as_it_is_or_flat():
    whole = torch.randn(4, 2)
    assert t.Transform().to_ours([whole]) is whole and t.Transform().to_theirs(whole)[0] is whole
    (flat,) = t.Flat().to_theirs(whole)
    assert flat.tolist() == whole.flatten().tolist() and t.Flat().to_ours([flat]) is flat


def test_parts_of_a_tensor_are_its_rows_in_order():
    sizes = {f"a[{i}]": (2 + i, 3) for i in (10, 9, 0)} | {"b": (4,)}
    assert members(sizes) == {"a": ["a[0]", "a[9]", "a[10]"], "b": ["b"]}
    assert joined(sizes) == {"a": (25, 3), "b": (4,)}


@pytest.mark.parametrize("pickled", [False, True])
def test_a_part_is_read_where_it_is(tmp_path: Path, pickled: bool):
    tensors, path = {"a": torch.arange(30.0).view(10, 3), "b": torch.ones(2)}, tmp_path / "file"
    if pickled:
        torch.save(tensors, path)
    else:
        path.write_bytes(b"a header" + b"".join(tensor.numpy().tobytes() for tensor in tensors.values()))
    starts = {"a": 8, "b": 8 + 30 * 4}
    stored = {
        name: Stored(path, torch.float32, tuple(x.shape), starts[name], pickled=name if pickled else None)
        for name, x in tensors.items()
    }
    found = split(stored, {"a[0]": (2, 3), "a[1]": (5, 3), "a[2]": (3, 3), "b": (2,)})
    parts = [found[f"a[{i}]"].read(f"a[{i}]") for i in range(3)]
    for part, rows in zip(parts, tensors["a"].split([2, 5, 3]), strict=True):
        assert torch.equal(part, rows)
    assert found["b"] == stored["b"] and torch.equal(found["b"].read("b"), tensors["b"])

"""Tensors of Hugging Face that are parts of several of ours: rows under rows, each part with a name of its own.

Mamba2 has one tensor for what our heads and our groups of heads project from two. A table calls its parts
``in_proj.weight[0]``, ``in_proj.weight[1]`` .. from the first row on; a name without a bracket is a whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from linear_moe.checkpoint.hf_folder import Stored

type Sizes = Mapping[str, tuple[int, ...]]


def whole_name(name: str) -> str:
    """Of the tensor that a part belongs to."""
    return name.partition("[")[0]


def members(names: Iterable[str]) -> dict[str, list[str]]:
    """Every tensor by name, and its parts from the first row on; a whole one is its only part."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(whole_name(name), []).append(name)
    return {name: sorted(parts, key=_number) for name, parts in found.items()}


def joined(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors, from those of the parts."""
    return {
        name: (sum(sizes[part][0] for part in parts), *sizes[parts[0]][1:]) if len(parts) > 1 else sizes[name]
        for name, parts in members(sizes).items()
    }


def split(stored: Mapping[str, Stored], sizes: Sizes) -> dict[str, Stored]:
    """Where the parts are, in tensors of the shapes that :func:`joined` says; whole ones are as they were."""
    found = dict(stored)
    for name, parts in members(sizes).items():
        first = 0
        for part in parts if len(parts) > 1 else ():
            found[part] = _rows(stored[name], first, sizes[part])
            first += sizes[part][0]
    return found


def _rows(stored: Stored, first: int, size: tuple[int, ...]) -> Stored:
    row = stored.size // stored.shape[0]
    return replace(stored, shape=size, start=stored.start + first * row, first=first)


def _number(name: str) -> int:
    number = name.partition("[")[2].rstrip("]")
    return int(number) if number else 0

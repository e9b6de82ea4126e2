"""Differences between the tensors that a model has and those that were found, in one grouped report."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

type Sizes = Mapping[str, tuple[int, ...]]


def differences(expected: Sizes, found: Sizes, *, ignored: Iterable[str] = ()) -> str:
    """What is missing, extra or of another shape, one line per group of names that differ in numbers only.

    Args:
        expected: shape by name.
        found: the same.
        ignored: patterns of found names that nobody misses.

    Returns:
        Indented lines; empty when all is well.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected and not any(re.search(p, name) for p in ignored)]
    shaped = [name for name in expected if name in found and expected[name] != found[name]]
    lines = []
    for what, names in (("missing", missing), ("not known", extra)):
        sizes = expected if what == "missing" else found
        for pattern, members in _groups(names).items():
            lines.append(f"    {what}: {pattern} {list(sizes[members[0]])}{_count(members)}")
    for pattern, members in _groups(shaped).items():
        wanted, got = list(expected[members[0]]), list(found[members[0]])
        lines.append(f"    wrong shape: {pattern} expected {wanted}, found {got}{_count(members)}")
    return "\n".join(lines)


def _groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by their pattern: ``layers.*.weight``; a single one under its own name."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    return {members[0] if len(members) == 1 else pattern: members for pattern, members in groups.items()}


def _count(members: list[str]) -> str:
    return f" ({len(members)} tensors, the first is {members[0]})" if len(members) > 1 else ""

"""``--sweep``: the neighbours of every entry of the configuration tables, tried one at a time."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

from linear_moe.bench.kernels.measures import median
from linear_moe.bench.record import Row


def sweep(run: Callable[[], Any], is_over: Callable[[], bool], is_smoke: bool) -> Iterator[Row]:
    """Milliseconds of ``run`` with one entry changed, beside those without, or why it fails."""
    for module, name in _tables():
        entries, base = _entries(module, name, run)
        for entry, other in [(known, other) for known in entries for other in _neighbours(known)]:
            if is_over():
                return
            place = f"{module.__name__.rpartition('.')[2]}.{name}"
            row = {"table": place, "from": str(entry), "to": str(other), "base_ms": base}
            try:
                with mock.patch.object(module, name, _swapped(getattr(module, name), entry, other)):
                    milliseconds, _ = median(run)
                yield {**row, "ms": milliseconds}
            except Exception as problem:  # too much shared memory, say
                yield {**row, "error": f"{type(problem).__name__}: {str(problem)[:200]}"}
            if is_smoke:
                return


def _tables() -> Iterator[tuple[ModuleType, str]]:
    """Every function of the configuration modules that gives warps and stages."""
    from linear_moe.kernels.triton import configs, delta_configs, dplr_configs

    for module in (configs, delta_configs, dplr_configs):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            is_own = function.__module__ == module.__name__ and not name.startswith("_")
            result = typing.get_type_hints(function).get("return")
            if is_own and "num_warps" in getattr(result, "__dataclass_fields__", ()):
                yield module, name


def _entries(module: ModuleType, name: str, run: Callable[[], Any]) -> tuple[list[Any], float]:
    """What a call takes from a table, and its milliseconds."""
    original = getattr(module, name)
    seen: dict[Any, None] = {}

    def record(*args: Any, **kwargs: Any) -> Any:
        entry = original(*args, **kwargs)
        seen[entry] = None
        return entry

    with mock.patch.object(module, name, record):
        run()
    return list(seen), median(run)[0]


def _swapped(original: Callable[..., Any], entry: Any, other: Any) -> Callable[..., Any]:
    def pick(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        return other if found == entry else found

    return pick


def _neighbours(entry: Any) -> Iterator[Any]:
    """Other warps and stages, and blocks of columns of half and of twice the width."""
    for width in ("values", "columns"):
        if getattr(entry, width, 0):
            for value in (getattr(entry, width) // 2, getattr(entry, width) * 2):
                if 16 <= value <= 128:
                    yield dataclasses.replace(entry, **{width: value})
    for warps in (2, 4, 8):
        for stages in (1, 2, 3):
            if (warps, stages) != (entry.num_warps, entry.num_stages):
                yield dataclasses.replace(entry, num_warps=warps, num_stages=stages)

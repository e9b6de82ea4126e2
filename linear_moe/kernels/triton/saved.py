"""A plan and the tensors in it, kept between forward and backward as autograd keeps tensors.

A tensor that an attribute of ``ctx`` holds is none that autograd knows of: it stays after the backward pass has let go
of the others, checkpointing (``use_reentrant=False``) and offloading do not see it, and a change in place between
forward and backward gives wrong gradients, without an error.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the plan is among those that autograd keeps."""

    index: int


def save(ctx: Any, plan: Any, *tensors: Tensor | None) -> None:
    """``ctx.save_for_backward`` of ``tensors``, and of those in ``plan``, a dataclass that may hold others.

    A tensor that is there twice is saved once.
    """
    found = list(tensors)
    ctx.plan = _take_out(plan, found)
    ctx.num_beside_plan = len(tensors)
    ctx.save_for_backward(*found)


def saved(ctx: Any) -> Any:
    """The plan, then the tensors, as they were given to :func:`save`."""
    found = ctx.saved_tensors
    return _put_back(ctx.plan, found), *found[: ctx.num_beside_plan]


def _take_out(plan: Any, found: list[Tensor | None]) -> Any:
    kind: Any = type(plan)
    values: dict[str, Any] = {}
    for name in _names(kind):
        x = getattr(plan, name)
        if isinstance(x, Tensor):
            index = next((i for i, y in enumerate(found) if y is x), len(found))
            if index == len(found):
                found.append(x)
            x = _Place(index)
        elif is_dataclass(x):
            x = _take_out(x, found)
        values[name] = x
    return kind(**values)


def _put_back(plan: Any, found: tuple[Tensor | None, ...]) -> Any:
    kind: Any = type(plan)
    values: dict[str, Any] = {}
    for name in _names(kind):
        x = getattr(plan, name)
        if isinstance(x, _Place):
            x = found[x.index]
        elif is_dataclass(x):
            x = _put_back(x, found)
        values[name] = x
    return kind(**values)


@cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))

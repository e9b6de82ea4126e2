"""A plan and the tensors in it, kept between forward and backward as autograd keeps tensors.

A tensor that an attribute of ``ctx`` holds is none that autograd knows of: it stays after the backward pass has let go
of the others, checkpointing (``use_reentrant=False``) and offloading do not see it, and a change in place between
forward and backward gives wrong gradients, without an error.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
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
    changed: dict[str, Any] = {}
    for name, x in _parts(plan):
        if is_dataclass(x):
            changed[name] = _take_out(x, found)
        elif isinstance(x, Tensor):
            index = next((i for i, y in enumerate(found) if y is x), len(found))
            if index == len(found):
                found.append(x)
            changed[name] = _Place(index)
    return replace(plan, **changed)


def _put_back(plan: Any, found: tuple[Tensor | None, ...]) -> Any:
    changed: dict[str, Any] = {}
    for name, x in _parts(plan):
        if isinstance(x, _Place):
            changed[name] = found[x.index]
        elif is_dataclass(x):
            changed[name] = _put_back(x, found)
    return replace(plan, **changed)


def _parts(plan: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(plan, field.name)) for field in fields(plan)]

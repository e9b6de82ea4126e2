"""First derivatives only: a backward pass that would be differentiated again is refused, never left out.

``torch.autograd.function.once_differentiable`` refuses a second derivative only where the incoming gradient depends on
something. That of a sum does not: the gradient would be a constant, and a penalty on it have no gradient of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A ``backward`` of an autograd function that knows no derivative of its own.

    Raises:
        RuntimeError: (what it returns) under ``create_graph=True``.
    """

    @wraps(backward)
    def first(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():  # which only create_graph does here
            raise RuntimeError(
                "the gradient of an operation of linear_moe.kernels is to be differentiated again (create_graph=True)\n"
                "  why: its backward pass is a kernel without one, and a part of the second gradient would be missing\n"
                "  try: without create_graph; or LINEAR_MOE_KERNELS=reference, token loops, for small models"
            )
        return backward(ctx, *grads)

    return first

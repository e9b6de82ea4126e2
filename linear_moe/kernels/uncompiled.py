"""Operations with a backward pass of their own, between the graphs of ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(reason="an operation with a backward pass of its own is no part of a graph")
def run_uncompiled(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``run(*args, **kwargs)``, as without a compiler."""
    return run(*args, **kwargs)

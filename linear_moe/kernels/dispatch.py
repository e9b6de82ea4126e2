"""Which backend runs a kernel, and why: one table, first available wins.

``LINEAR_MOE_KERNELS=reference`` (token loops, to debug) or ``=chunked`` picks one by name.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from linear_moe.kernels import chunked_delta, chunked_diag, chunked_dplr, conv, reference

ENVIRONMENT_VARIABLE = "LINEAR_MOE_KERNELS"


@dataclass(frozen=True)
class Backend:
    """One implementation of one operation."""

    name: str
    run: Callable[..., Any]
    available: Callable[[torch.device, torch.dtype], tuple[bool, str]]
    """Whether it can run there, and the reason in a few words."""


def _always(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    return True, "torch operations, any device and dtype"


def _when_asked(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    return False, f"token loops, only with {ENVIRONMENT_VARIABLE}=reference"


def _backends(chunked: Callable[..., Any], token_loop: Callable[..., Any]) -> tuple[Backend, ...]:
    return Backend("chunked", chunked, _always), Backend("reference", token_loop, _when_asked)


BACKENDS: dict[str, tuple[Backend, ...]] = {
    "diag_decay": _backends(chunked_diag.diag_decay, reference.diag_decay),
    "delta_rule": _backends(chunked_delta.delta_rule, reference.delta_rule),
    "diag_decay_segment": _backends(chunked_diag.diag_decay_segment, reference.diag_decay_segment),
    "delta_rule_segment": _backends(chunked_delta.delta_rule_segment, reference.delta_rule_segment),
    "dplr_delta_rule": _backends(chunked_dplr.dplr_delta_rule, reference.dplr_delta_rule),
    "dplr_delta_rule_segment": _backends(
        chunked_dplr.dplr_delta_rule_segment, reference.dplr_delta_rule_segment
    ),
    "short_conv": _backends(conv.short_conv, reference.short_conv),
}


def pick(op: str, device: torch.device, dtype: torch.dtype) -> tuple[Backend, str]:
    """The backend that runs ``op`` on such tensors, and why.

    Raises:
        ValueError: ``LINEAR_MOE_KERNELS`` names no backend.
    """
    asked = os.environ.get(ENVIRONMENT_VARIABLE, "")
    for backend in BACKENDS[op]:
        if asked:
            if backend.name == asked:
                return backend, f"{ENVIRONMENT_VARIABLE}={asked}"
            continue
        is_available, reason = backend.available(device, dtype)
        if is_available:
            return backend, reason
    names = ", ".join(backend.name for backend in BACKENDS[op])
    raise ValueError(
        f"{ENVIRONMENT_VARIABLE}={asked} names no backend of {op}. Unset it, or set it to one of: {names}."
    )


def describe(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """One line for the start-up log, such as ``diag_decay: chunked (torch operations, any device and dtype)``."""
    backend, reason = pick(op, device, dtype)
    return f"{op}: {backend.name} ({reason})"


def warn_if_unfused(op: str, backend: Backend, device: torch.device) -> None:
    """Say, once for each operation, that a GPU runs it without a fused kernel; quiet where somebody chose so."""
    if device.type == "cuda" and backend.name == "chunked" and not os.environ.get(ENVIRONMENT_VARIABLE):
        _warn_of_torch_once(op)


@cache
def _warn_of_torch_once(op: str) -> None:
    warnings.warn(
        f"{op} has no fused kernel for this device and runs on chunked torch: the same results, but every operation, "
        f"and every step from chunk to chunk, is a launch of its own with intermediates in GPU memory, so it is "
        f"slower than a fused kernel; {ENVIRONMENT_VARIABLE}=chunked chooses it without this notice",
        stacklevel=2,
    )

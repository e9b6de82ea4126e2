"""Which backend runs a kernel, and why: one table, first available wins.

``LINEAR_MOE_KERNELS=reference`` (token loops, to debug), ``=chunked`` or ``=triton`` puts one first by name; operations
and calls that it does not cover run as they would without it.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from linear_moe.kernels import (
    chunked_delta,
    chunked_diag,
    chunked_dplr,
    conv,
    cross_entropy,
    gated_norm,
    reference,
    rows,
    swiglu,
)

ENVIRONMENT_VARIABLE = "LINEAR_MOE_KERNELS"

NAMES = ("chunked", "reference", "triton")
"""Its values; an exported folder knows them all, and has no fused kernel."""


def _takes_everything(*args: Any, **kwargs: Any) -> bool:
    return True


@dataclass(frozen=True)
class Backend:
    """One implementation of one operation."""

    name: str
    run: Callable[..., Any]
    available: Callable[[torch.device, torch.dtype], tuple[bool, str]]
    """Whether it can run there, and the reason in a few words."""
    takes: Callable[..., bool] = _takes_everything
    """Whether it covers a call with these arguments."""
    begins: bool = False
    """Whether it takes a ``state`` that is on its way, and starts what does not need it."""


def _always(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    return True, "torch operations, any device and dtype"


def _when_asked(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    return _asked() == "reference", f"token loops, only with {ENVIRONMENT_VARIABLE}=reference"


def _fused(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    if _asked() != "triton":
        return False, f"fused, not measured yet: only with {ENVIRONMENT_VARIABLE}=triton"
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False, f"no fused kernel computes in {dtype}"
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu" and is_interpreted:  # which computes bfloat16 wrongly, without saying so
        return dtype != torch.bfloat16, "Triton's interpreter, float32 and float16"
    if device.type != "cuda" or is_interpreted or torch.cuda.get_device_capability(device) < (8, 0):
        return False, "fused kernels need a CUDA device of compute capability 8.0"
    return True, "fused"


def _fused_diag_decay(*args: Any, **kwargs: Any) -> Any:
    from linear_moe.kernels.triton import diag  # Triton costs a second to import

    return diag.diag_decay(*args, **kwargs)


def _fused_diag_decay_takes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    log_decay_v: Tensor | None = None,
    bonus: Tensor | None = None,
    **others: Any,
) -> bool:
    """Not a vector decay on both sides, which no mixer has."""
    return log_decay_v is None or log_decay is None or log_decay.ndim < 4


def _fused_diag_decay_segment(*args: Any, **kwargs: Any) -> Any:
    from linear_moe.kernels.triton import diag_segment

    return diag_segment.diag_decay_segment(*args, **kwargs)


def _fused_diag_decay_segment_takes(
    k: Tensor, v: Tensor, log_decay: Tensor | None = None, *, log_decay_v: Tensor | None = None, **others: Any
) -> bool:
    """As the outputs: not a vector decay on both sides."""
    return log_decay_v is None or log_decay is None or log_decay.ndim < 4


def _fused_delta_rule(*args: Any, **kwargs: Any) -> Any:
    from linear_moe.kernels.triton import delta

    return delta.delta_rule(*args, **kwargs)


def _fused_delta_rule_segment(*args: Any, **kwargs: Any) -> Any:
    from linear_moe.kernels.triton import delta_segment

    return delta_segment.delta_rule_segment(*args, **kwargs)


def _fused_dplr_delta_rule(*args: Any, **kwargs: Any) -> Any:
    from linear_moe.kernels.triton import dplr

    return dplr.dplr_delta_rule(*args, **kwargs)


def _fused_dplr_delta_rule_segment(*args: Any, **kwargs: Any) -> Any:
    from linear_moe.kernels.triton import dplr_segment

    return dplr_segment.dplr_delta_rule_segment(*args, **kwargs)


def _backends(
    chunked: Callable[..., Any], token_loop: Callable[..., Any], *fused: Backend
) -> tuple[Backend, ...]:
    in_torch = Backend("chunked", chunked, _always, begins=True)
    return *fused, in_torch, Backend("reference", token_loop, _when_asked)


def _fused_short_conv(*args: Any, **kwargs: Any) -> Any:
    from linear_moe.kernels.triton import short_conv

    return short_conv.short_conv(*args, **kwargs)


def _fused_short_conv_takes(x: Tensor, weight: Tensor, *others: Any, **options: Any) -> bool:
    """Up to four taps: their sums are written out one by one."""
    return weight.shape[-1] <= 4


def _fused_gated_norm(*args: Any, **kwargs: Any) -> Any:
    from linear_moe.kernels.triton import gated_norm as fused

    return fused.gated_rms_norm(*args, **kwargs)


def _fused_gated_norm_takes(x: Tensor, *others: Any, **options: Any) -> bool:
    """Heads up to 256 wide: a program has whole heads in registers."""
    return x.shape[-1] <= 256


def _fused_cross_entropy_(*args: Any, **kwargs: Any) -> Any:
    from linear_moe.kernels.triton import cross_entropy as fused

    return fused.cross_entropy_(*args, **kwargs)


def _fused_spread_rows(*args: Any, **kwargs: Any) -> Any:
    from linear_moe.kernels.triton import rows as fused

    return fused.spread_rows(*args, **kwargs)


def _fused_collect_rows(*args: Any, **kwargs: Any) -> Any:
    from linear_moe.kernels.triton import rows as fused

    return fused.collect_rows(*args, **kwargs)


def _fused_weighted_swiglu(*args: Any, **kwargs: Any) -> Any:
    from linear_moe.kernels.triton import swiglu as fused

    return fused.weighted_swiglu(*args, **kwargs)


BACKENDS: dict[str, tuple[Backend, ...]] = {
    "diag_decay": _backends(
        chunked_diag.diag_decay,
        reference.diag_decay,
        Backend("triton", _fused_diag_decay, _fused, _fused_diag_decay_takes, begins=True),
    ),
    "delta_rule": _backends(
        chunked_delta.delta_rule,
        reference.delta_rule,
        Backend("triton", _fused_delta_rule, _fused, begins=True),
    ),
    "diag_decay_segment": _backends(
        chunked_diag.diag_decay_segment,
        reference.diag_decay_segment,
        Backend("triton", _fused_diag_decay_segment, _fused, _fused_diag_decay_segment_takes),
    ),
    "delta_rule_segment": _backends(
        chunked_delta.delta_rule_segment,
        reference.delta_rule_segment,
        Backend("triton", _fused_delta_rule_segment, _fused),
    ),
    "dplr_delta_rule": _backends(
        chunked_dplr.dplr_delta_rule,
        reference.dplr_delta_rule,
        Backend("triton", _fused_dplr_delta_rule, _fused, begins=True),
    ),
    "dplr_delta_rule_segment": _backends(
        chunked_dplr.dplr_delta_rule_segment,
        reference.dplr_delta_rule_segment,
        Backend("triton", _fused_dplr_delta_rule_segment, _fused),
    ),
    "short_conv": _backends(
        conv.short_conv,
        reference.short_conv,
        Backend("triton", _fused_short_conv, _fused, _fused_short_conv_takes),
    ),
    "gated_rms_norm": _backends(
        gated_norm.gated_rms_norm,
        reference.gated_rms_norm,
        Backend("triton", _fused_gated_norm, _fused, _fused_gated_norm_takes),
    ),
    "cross_entropy_": _backends(
        cross_entropy.cross_entropy_,
        reference.cross_entropy_,
        Backend("triton", _fused_cross_entropy_, _fused),
    ),
    "spread_rows": _backends(
        rows.spread_rows, reference.spread_rows, Backend("triton", _fused_spread_rows, _fused)
    ),
    "collect_rows": _backends(
        rows.collect_rows, reference.collect_rows, Backend("triton", _fused_collect_rows, _fused)
    ),
    "weighted_swiglu": _backends(
        swiglu.weighted_swiglu,
        reference.weighted_swiglu,
        Backend("triton", _fused_weighted_swiglu, _fused),
    ),
}


def pick(
    op: str, device: torch.device, dtype: torch.dtype, takes: Callable[[Backend], bool] = _takes_everything
) -> tuple[Backend, str]:
    """The backend that runs ``op`` on such tensors, and why; ``takes`` says whether one covers the call at hand.

    Raises:
        ValueError: ``LINEAR_MOE_KERNELS`` names no backend.
    """
    asked = _asked()
    if asked and asked not in NAMES:
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}={asked} names no backend\n"
            f"  why: the backends are {', '.join(NAMES)}\n"
            f"  try: unset it, or {ENVIRONMENT_VARIABLE}={NAMES[-1]}"
        )
    for backend in sorted(BACKENDS[op], key=lambda backend: backend.name != asked):
        is_available, reason = backend.available(device, dtype)
        if is_available and takes(backend):
            return backend, f"{ENVIRONMENT_VARIABLE}={asked}" if backend.name == asked else reason
    raise AssertionError(f"{op} has no backend that always runs")


def describe(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """One line for the start-up log, such as ``diag_decay: chunked (torch operations, any device and dtype)``."""
    backend, reason = pick(op, device, dtype)
    return f"{op}: {backend.name} ({reason})"


def warn_if_unfused(op: str, backend: Backend, device: torch.device) -> None:
    """Say, once for each operation, that it runs without a fused kernel: on a GPU, unless somebody chose so, and
    anywhere else to somebody who chose fused ones.
    """
    is_expected = _asked() != "chunked" if device.type == "cuda" else _asked() == "triton"
    if is_expected and backend.name == "chunked":
        _warn_of_torch_once(op)


@cache
def _warn_of_torch_once(op: str) -> None:
    warnings.warn(
        f"{op} has no fused kernel for this device and these arguments, and runs on chunked torch: the same results, "
        f"but every operation, and every step from chunk to chunk, is a launch of its own with intermediates in GPU "
        f"memory, so it is slower than a fused kernel; {ENVIRONMENT_VARIABLE}=chunked chooses it without this notice",
        stacklevel=2,
    )


def is_asked() -> bool:
    """Whether a backend is chosen by name."""
    return bool(_asked())


def _asked() -> str:
    return os.environ.get(ENVIRONMENT_VARIABLE, "")

"""Which backend runs a kernel: one table, the first one without an obstacle wins.

``LINEAR_MOE_KERNELS=reference`` (token loops, to debug), ``=chunked`` or ``=triton`` puts one first by name; operations
and calls that it does not cover run as they would without it.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from linear_moe.kernels import (
    adam,
    assembler,
    bounded_decay,
    chunked_delta,
    chunked_diag,
    chunked_dplr,
    conv,
    cross_entropy,
    edits,
    gated_norm,
    lerp,
    log_decay,
    reference,
    rms_norm,
    rotary,
    routes,
    rows,
    scaled,
    skip_norm,
    step,
    swiglu,
    weight_grad,
)
from linear_moe.kernels.autocast import without_autocast

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
    obstacle: Callable[[torch.device, torch.dtype], str | None]
    """Why it cannot run there, in a few words; ``None``: it can."""
    takes: Callable[..., bool] = _takes_everything
    """Whether it covers a call with these arguments."""
    begins: bool = False
    """Whether it takes a ``state`` that is on its way, and starts what does not need it."""


def _none(device: torch.device, dtype: torch.dtype) -> None:
    """Operations of torch run on any device and dtype."""


def _unless_asked(device: torch.device, dtype: torch.dtype) -> str | None:
    """Token loops are slow."""
    return None if _asked() == "reference" else f"{ENVIRONMENT_VARIABLE} is not reference"


def _fused(device: torch.device, dtype: torch.dtype) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile and torch.export trace operations of torch"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"no fused kernel computes in {dtype}"
    is_interpreted = _is_interpreted()
    if device.type == "cpu" and is_interpreted and _asked() == "triton" and _has_triton():
        return "Triton's interpreter computes bfloat16 wrongly" if dtype == torch.bfloat16 else None
    if device.type != "cuda" or is_interpreted or torch.version.hip is not None:
        return "fused kernels need a CUDA device of NVIDIA"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return "fused kernels need compute capability 8.0"
    if not _has_triton():
        return "triton cannot be imported"
    return assembler.obstacle() if capability[0] == 9 else None


_TRUE = ("1", "true", "on", "yes", "y")
"""What Triton reads as true."""


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in _TRUE


@cache
def _has_triton() -> bool:
    """Asked once: looking for what is not imported costs every operation 0.1 ms."""
    try:
        importlib.import_module("triton")
    except Exception:  # not installed, or for another driver
        return False
    return True


def _is_plain(x: Any) -> bool:
    """Not a tensor that stands for others (fake ones, DTensor): a kernel reads memory."""
    return not isinstance(x, Tensor) or type(x).__torch_dispatch__ is Tensor.__torch_dispatch__


def _fused_scan(device: torch.device, dtype: torch.dtype) -> str | None:
    """As the others, but where Triton makes wrong code of a memory that one product writes and another reads."""
    obstacle = _fused(device, dtype)
    if obstacle is None and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (10, 11):
        return "Triton miscompiles scans for this GPU (triton-lang/triton#9871, #10590, #10993)"
    return obstacle


def _fused_sums(device: torch.device, dtype: torch.dtype) -> str | None:
    """As the others, but on GPUs that copy tiles by descriptors of tensors, and add them to memory."""
    obstacle = _fused(device, dtype)
    if obstacle is None and device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return "this one needs compute capability 9.0"
    return obstacle


def _takes_decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    log_decay_v: Tensor | None = None,
    **others: Any,
) -> bool:
    """Not a vector decay on both sides, which no mixer has."""
    return log_decay_v is None or log_decay is None or log_decay.ndim < 4


def _takes_segment_decay(
    k: Tensor, v: Tensor, log_decay: Tensor | None = None, *, log_decay_v: Tensor | None = None, **others: Any
) -> bool:
    """As the outputs."""
    return _takes_decay(k, k, v, log_decay, log_decay_v=log_decay_v)


def _takes_taps(x: Tensor, weight: Tensor, *others: Any, **options: Any) -> bool:
    """Up to four taps: their sums are written out one by one."""
    return weight.shape[-1] <= 4


def _takes_width(x: Tensor, *others: Any, **options: Any) -> bool:
    """Heads up to 256 wide: a program has whole heads in registers."""
    return x.shape[-1] <= 256


def _takes_group(x: Tensor, *others: Any, num_groups: int = 1, **options: Any) -> bool:
    """Groups of heads up to 8192 channels wide: a program has a token of one in registers."""
    return x.shape[2] * x.shape[3] <= 8192 * num_groups


def _takes_stream(x: Tensor, *others: Any, **options: Any) -> bool:
    """Hidden sizes up to 8192, of any tokens: a program has whole ones in registers."""
    return x.shape[-1] <= 8192


def _takes_mixes(
    x: Tensor, other: Tensor, weight: Tensor | None = None, logits: Tensor | None = None, **options: Any
) -> bool:
    """Up to six: their gradients are arguments of one kernel each."""
    return (weight if weight is not None else cast(Tensor, logits)[0, 0]).shape[0] <= 6


def _takes_experts(x: Tensor, *others: Any, **options: Any) -> bool:
    """Up to 1024 experts: a program has all of a token in registers."""
    return x.shape[1] <= 1024


def _takes_choice(x: Tensor, per_token: int, **options: Any) -> bool:
    """As many experts, and up to 64 of a token: the search for each is written out."""
    return _takes_experts(x) and per_token <= 64


def _takes_read(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate: Tensor | None = None,
    q: Tensor | None = None,
    *others: Any,
    **options: Any,
) -> bool:
    """Values and keys up to 256 wide: a program has whole heads in registers."""
    return x.shape[-1] <= 256 and (q is None or q.shape[-1] <= 256)


def _takes_sums(total: Tensor, dy: Tensor, x: Tensor, ends: Tensor, add: bool) -> bool:
    """16-bit operands, whose products are exact in float32; contiguous tensors whose places and rows, of every expert,
    are multiples of 16 bytes, which descriptors ask for.
    """
    tensors = (total, dy, x, ends)
    fits = (
        dy.element_size() == 2 and total.dtype == torch.float32 and all(n % 8 == 0 for n in total.shape[1:])
    )
    return (
        fits
        and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors[:3])
        and ends.is_contiguous()
    )


def _takes_flat(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    half: Tensor | None = None,
    *,
    step: Tensor,
    **options: Any,
) -> bool:
    """Contiguous tensors, and a half that has half of the bits."""
    tensors = [param, grad, exp_avg, exp_avg_sq]
    if half is not None:
        dtypes = (torch.float16,) if _is_interpreted() else (torch.float16, torch.bfloat16)
        if half.dtype not in dtypes:
            return False
        tensors.append(half)
    same = all(x.dtype == torch.float32 for x in tensors[:4])
    return same and step.device.type == "cpu" and all(x.is_contiguous() for x in tensors)


def _operation(
    op: str,
    in_torch: ModuleType,
    fused: str,
    takes: Callable[..., bool] = _takes_everything,
    *,
    begins: bool = False,
) -> tuple[str, tuple[Backend, ...]]:
    """Its name and its backends: functions of that name in a module of fused kernels, one in torch, and ``reference``.

    Args:
        op: the operation.
        in_torch: the module in torch.
        fused: name of the module in ``triton/``.
        takes: which calls that one covers.
        begins: whether it takes a ``state`` that is on its way.
    """

    def takes_plain(*args: Any, **kwargs: Any) -> bool:
        return all(map(_is_plain, (*args, *kwargs.values()))) and takes(*args, **kwargs)

    def run_fused(*args: Any, **kwargs: Any) -> Any:
        # Only now: Triton takes a second to import.
        module = importlib.import_module(f"linear_moe.kernels.triton.{fused}")
        with torch.cuda.device_of(args[0]):  # Triton launches on the current device
            return getattr(module, op)(*args, **kwargs)

    obstacle = _fused_sums if in_torch is weight_grad else _fused
    if in_torch in (chunked_diag, chunked_delta, chunked_dplr):
        obstacle = _fused_scan
    return op, (
        Backend("triton", run_fused, obstacle, takes_plain, begins),
        Backend("chunked", getattr(in_torch, op), _none, begins=True),
        Backend("reference", getattr(reference, op), _unless_asked),
    )


BACKENDS: dict[str, tuple[Backend, ...]] = dict(
    [
        _operation("diag_decay", chunked_diag, "diag", _takes_decay, begins=True),
        _operation("delta_rule", chunked_delta, "delta", begins=True),
        _operation("dplr_delta_rule", chunked_dplr, "dplr", begins=True),
        _operation("diag_decay_segment", chunked_diag, "diag_segment", _takes_segment_decay),
        _operation("delta_rule_segment", chunked_delta, "delta_segment"),
        _operation("dplr_delta_rule_segment", chunked_dplr, "dplr_segment"),
        _operation("short_conv", conv, "short_conv", _takes_taps),
        _operation("conv_and_split", conv, "short_conv", _takes_taps),
        _operation("gated_rms_norm", gated_norm, "gated_norm", _takes_width),
        _operation("log_decay_of", log_decay, "log_decay", _takes_width),
        _operation("bounded_decay_of", bounded_decay, "bounded_decay", _takes_width),
        _operation("lerp_tokens", lerp, "lerp", _takes_mixes),
        _operation("edit_keys", edits, "edit_keys", _takes_width),
        _operation("gated_group_norm", gated_norm, "group_norm", _takes_read),
        _operation("scale_heads", scaled, "scaled", _takes_width),
        _operation("rotate_heads", rotary, "rotary"),
        _operation("rms_norm", rms_norm, "rms_norm", _takes_stream),
        _operation("skip_gate_norm", skip_norm, "skip_norm", _takes_group),
        _operation("cross_entropy_", cross_entropy, "cross_entropy"),
        _operation("choose_experts", routes, "routes", _takes_choice),
        _operation("sort_slots", routes, "routes", _takes_experts),
        _operation("spread_rows", rows, "rows"),
        _operation("collect_rows", rows, "rows"),
        _operation("weighted_swiglu", swiglu, "swiglu"),
        _operation("grouped_weight_grad_", weight_grad, "weight_grad", _takes_sums),
        _operation("adam_", adam, "adam", _takes_flat),
    ]
)


def pick(
    op: str, device: torch.device, dtype: torch.dtype, takes: Callable[[Backend], bool] = _takes_everything
) -> Backend:
    """The backend that runs ``op`` on such tensors; ``takes`` says whether one covers the call at hand.

    Raises:
        ValueError: ``LINEAR_MOE_KERNELS`` names no backend.
    """
    asked = _asked()
    if asked and asked not in NAMES:
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}={asked} names no backend\n"
            f"  why: the backends are {', '.join(NAMES)}\n"
            f"  try: unset it, or {ENVIRONMENT_VARIABLE}={NAMES[0]}"
        )
    table = BACKENDS[op]
    if asked:
        table = tuple(sorted(table, key=lambda backend: backend.name != asked))
    for backend in table:
        if backend.obstacle(device, dtype) is None and takes(backend):
            return backend
    raise AssertionError(f"{op} has no backend that always runs")


def tried(op: str, backend: Backend, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Backend, bool]:
    """The backend that was picked, or, where a trial showed that its kernel is wrong on this device, the one in torch;
    and whether that holds for every such call, or this one could not be tried.

    A fused kernel that somebody asked for by name is not tried.
    """
    if backend.name != "triton" or is_asked():
        return backend, True
    trial = importlib.import_module("linear_moe.kernels.triton.trial")
    in_torch = next(other for other in BACKENDS[op] if other.name == "chunked")
    passed = trial.passes(op, backend.run, in_torch.run, args, kwargs)
    return in_torch if passed is False else backend, passed is not None


def fused(op: str, *args: Any, **kwargs: Any) -> Callable[[], Any] | None:
    """The call, to be made, if a fused kernel covers it and passes its trial: for who has better than chunked torch.

    Arguments are not checked.
    """
    like = args[0]
    backend = pick(op, like.device, like.dtype, lambda backend: backend.takes(*args, **kwargs))
    backend, _ = tried(op, backend, args, kwargs)
    return partial(backend.run, *args, **kwargs) if backend.name == "triton" else None


def warn_if_unfused(op: str, backend: Backend, device: torch.device, dtype: torch.dtype) -> None:
    """Say, once for each operation and reason, that it runs without a fused kernel: on a GPU, unless somebody chose so,
    and anywhere else to somebody who chose fused ones.
    """
    is_expected = _asked() != "chunked" if device.type == "cuda" else _asked() == "triton"
    if is_expected and backend.name == "chunked":
        why = "it does not cover these arguments"
        if all(other.name != "triton" for other in BACKENDS[op]):  # in an exported folder
            why = "it comes with the package linear_moe"
        elif (obstacle := BACKENDS[op][0].obstacle(device, dtype)) is not None:
            why = obstacle
        _warn_of_torch_once(op, why)


@cache
def _warn_of_torch_once(op: str, why: str) -> None:
    warnings.warn(
        f"{op} has no fused kernel here ({why}), and runs on chunked torch: the same results, but every operation, and "
        f"every step from chunk to chunk, is a launch of its own with intermediates in GPU memory, so it is slower "
        f"than a fused kernel; {ENVIRONMENT_VARIABLE}=chunked chooses it without this notice",
        stacklevel=2,
    )


def is_asked() -> bool:
    """Whether a backend is chosen by name."""
    return bool(_asked())


def _asked() -> str:
    return os.environ.get(ENVIRONMENT_VARIABLE, "")


def run(op: str, like: Tensor, *args: Any, **kwargs: Any) -> Any:
    """An operation on arguments that are checked, by the backend picked for the device and dtype of ``like``."""
    with without_autocast(like.device):
        if torch.compiler.is_compiling() and torch.is_grad_enabled():
            # Only now: it imports torch._dynamo, which takes a second, and Triton.
            from linear_moe.kernels.uncompiled import run_uncompiled

            return run_uncompiled(_run_picked, op, like, *args, **kwargs)
        return _run_picked(op, like, *args, **kwargs)


MOST_KNOWN = 4096
"""Kinds of calls that are remembered: a few for each kind of layer, more where the number of rows is up to chance."""

_known: dict[tuple[Any, ...], Backend] = {}


def run_checked(op: str, check: Callable[[], Any], like: Tensor, *args: Any, **kwargs: Any) -> Any:
    """:func:`run` of arguments that ``check`` has let through: now, or an earlier call with such arguments.

    On a GPU, which waits for the host where operations are small, everything that ``check``, :func:`pick` and trials
    go by is looked at once: shapes, strides, dtypes and devices, and options. On a CPU ``check`` looks at values, too.
    """
    kind = _kind(op, like, args, kwargs)
    backend = None if kind is None else _known.get(kind)
    is_known = backend is not None and backend in BACKENDS[op]
    if not is_known:
        check()
    if kind is None:
        return run(op, like, *args, **kwargs)
    with without_autocast(like.device):
        if backend is None or not is_known:
            backend, lasts = _chosen(op, like, args, kwargs)
            if len(_known) >= MOST_KNOWN:
                _known.clear()
            if lasts:
                _known[kind] = backend
        return backend.run(*args, **(kwargs if backend.begins else _arrived(kwargs)))


def _kind(op: str, like: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """Equal for calls that are checked and picked alike; ``None`` where each one is to be looked at by itself."""
    if like.is_cpu or torch.compiler.is_compiling() or (op in step.OPERATIONS and like.shape[1] == 1):
        return None
    kind: list[Any] = [op, _asked(), torch.is_grad_enabled()]
    for x in (*args, *kwargs.values()):
        if type(x) is Tensor or type(x) is Parameter:
            kind += (x.dtype, x.device, x.shape, x.stride(), x.requires_grad)
        elif x is None or type(x) in (bool, int, str, tuple):
            kind += (type(x), x)
        elif type(x) is float or callable(x):  # neither is looked at
            kind.append(float if type(x) is float else callable)
        else:  # a tensor that stands for others
            return None
    return tuple(kind)


def _run_picked(op: str, like: Tensor, *args: Any, **kwargs: Any) -> Any:
    if op in step.OPERATIONS and like.shape[1] == 1:
        kwargs = _arrived(kwargs)  # of one token there is nothing worth starting
        if not is_asked() and step.takes(*args, **kwargs):
            return step.OPERATIONS[op](*args, **kwargs)
    backend, _ = _chosen(op, like, args, kwargs)
    return backend.run(*args, **(kwargs if backend.begins else _arrived(kwargs)))


def _chosen(op: str, like: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Backend, bool]:
    """What runs a call, and whether it runs every such call."""
    backend = pick(op, like.device, like.dtype, lambda backend: backend.takes(*args, **kwargs))
    warn_if_unfused(op, backend, like.device, like.dtype)
    return tried(op, backend, args, kwargs)


def _arrived(kwargs: dict[str, Any]) -> dict[str, Any]:
    """With the ``state``, waited for."""
    state = kwargs.get("state")
    return {**kwargs, "state": state()} if callable(state) else kwargs

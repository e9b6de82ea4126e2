"""A fused kernel is tried before its first use: one small call of its kind, compared with float64.

Compilers make wrong code of right kernels on some GPUs and in some versions (docs/kernels.md names cases), and a model
trains on with a wrong gradient without complaint. So before a process uses an operation with tensors of a kind (dtypes,
widths of heads, lengths up to a factor of two, which decay, rows or documents, with or without gradients), random
tensors in the layout of those at hand, a row of up to ``NUM_TOKENS`` tokens, go through the fused kernel and, in
float64, through torch on the same device. An operation that differs, or does not compile, runs on chunked torch from
then on, and says so.

The row is cut into segments where those at hand will be, so that the kernels that run are the same, as compiled
(the tests' ``trial_launches.py``). Not tried: other alignments, which compile variants of them. Nothing is tried while
a CUDA graph is captured; a warm-up comes before.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from linear_moe.kernels.segment import Segment
from linear_moe.kernels.triton import configs

NUM_TOKENS = 144
"""More than two chunks and a part of one, and a multiple of 16, as most lengths: another variant otherwise."""

LENGTHS = (61, 0, 83)
"""Documents, one of them empty, that fill ``NUM_TOKENS``."""

NUM_ROWS = 48
"""Of tokens that do not follow each other: logits, experts' rows."""

NUM_ELEMENTS = 2100
"""Of a parameter: two blocks and a part of one."""

_INSTEAD = {
    "adam_": "torch's own step: right, but clipping, Adam and the copy move 42 bytes an element and not 30",
    "grouped_weight_grad_": "torch's product: right, but rounded to half precision and added by another kernel",
}
"""What runs where a kernel is not used, if it is not chunked torch, and what that costs."""

_CHUNKED = (
    "chunked torch: right, but slower, with a launch for every operation and intermediates in GPU memory"
)

_OF_ROWS = ("spread_rows", "collect_rows")
"""Operations that cut rows alike whatever their number, with any dims behind it."""

TOLERANCE = {torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.15}
"""Largest difference over the largest element; a tile of other numbers is far above, rounding and TF32 are below."""

Run = Callable[..., Any]

_passed: dict[tuple[Any, ...], bool] = {}


def passes(op: str, fused: Run, exact: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool | None:
    """Whether a fused kernel may run this call: tried once for each kind of call, in every process.

    ``None``: it may, but cannot be tried now.

    Args:
        op: the operation's name.
        fused: runs it with the kernel on trial.
        exact: runs it in torch; gets the same arguments in float64.
        args: of the call at hand, of which only shapes, layouts and dtypes are looked at.
        kwargs: likewise.

    Raises:
        RuntimeError: the kernel broke the CUDA context.
    """
    trait = partial(_trait, is_cut=op not in _OF_ROWS)
    kind = (
        op,
        torch.is_grad_enabled(),
        *map(trait, args),
        *((name, trait(x)) for name, x in kwargs.items()),
    )
    found = _passed.get(kind)
    if found is None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if _cannot_wait(tensors[0].device) or any(x.numel() == 0 for x in tensors):
            return None
        _passed[kind] = found = _try(op, fused, exact, args, kwargs)
    return found


def _trait(x: Any, is_cut: bool) -> Any:
    """What of an argument makes another kind of call; of rows and tokens, which decide how rows are cut, the size.

    Strides of tokens are compiled in. Experts' rows are cut alike whatever their number, which changes in every step.
    """
    if isinstance(x, Tensor):
        num_lengths = 2 if is_cut and x.ndim > 2 else 0
        lengths, rest = x.shape[:num_lengths], x.shape[max(num_lengths, 1) :]
        sizes = *(n.bit_length() for n in lengths), *rest
        return x.device, x.dtype, sizes, x.stride()[1:], x.requires_grad
    return float if isinstance(x, float) else callable(x) or x  # no float is compiled in


def _cannot_wait(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _try(op: str, fused: Run, exact: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        with _alone(args[0].device):
            reason = _difference(fused, exact, inspect.signature(exact).bind(*args, **kwargs))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _check_context(op, args[0].device, error)
        reason = _in_words(error)
    if reason:
        warnings.warn(
            f"the fused kernel of {op} is not used: tried before its first use, {reason} ({_versions()}). It runs on "
            f"{_INSTEAD.get(op, _CHUNKED)}. Please report this; LINEAR_MOE_KERNELS=triton uses the kernel all the same",
            stacklevel=2,
        )
    return not reason


@contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """What surrounds the call at hand does not see this one: checkpointing counts what is saved."""
    waiting = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)  # float64's cumulative sums on a GPU are not
    if waiting:  # torch warns whoever sets it, to its default too
        torch.cuda.set_sync_debug_mode("default")
    try:
        with torch.inference_mode(False), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            yield
    finally:
        torch.use_deterministic_algorithms(is_deterministic, warn_only=warns)
        if waiting:
            torch.cuda.set_sync_debug_mode(waiting)


def _check_context(op: str, device: torch.device, error: Exception) -> None:
    """After an illegal access nothing runs in this process any more, chunked torch neither."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception:
        raise RuntimeError(
            f"the fused kernel of {op} broke the CUDA context: {_in_words(error)}\n"
            f"  why: it was tried with random numbers before its first use; {_versions()}\n"
            f"  try: LINEAR_MOE_KERNELS=chunked, which is slower, and report these lines"
        ) from error


def _difference(fused: Run, exact: Run, call: inspect.BoundArguments) -> str:
    """Where the results on random tensors differ, in words; empty if they do not."""
    given = call.arguments
    wanted = [name for name, x in given.items() if torch.is_grad_enabled() and _wants_gradient(name, x)]
    first = next(x for x in given.values() if isinstance(x, Tensor))
    noise = torch.Generator(first.device).manual_seed(0)
    call.arguments = _sample(given, first, noise)
    in_double = {name: _double(x) for name, x in call.arguments.items()}
    with configs.standing_for(*(*first.shape, 1, 1)[:2]):
        found = _results(fused, call, wanted)
        real = {name: y for name, y in found.items() if y.is_floating_point()}
        incoming = {name: torch.empty_like(y).normal_(generator=noise) for name, y in real.items()}
        found |= _gradients(found, call, wanted, incoming)
    call.arguments = in_double
    tolerance = next(
        TOLERANCE[x.dtype] for x in given.values() if isinstance(x, Tensor) and x.is_floating_point()
    )
    expected = _results(exact, call, wanted)
    expected |= _gradients(expected, call, wanted, {name: y.double() for name, y in incoming.items()})
    overall = max((y.abs().max().item() for y in expected.values() if y.numel()), default=0.0)
    for name, y in expected.items():
        if found[name].shape != y.shape:
            return f"{name} is {list(found[name].shape)}, and not {list(y.shape)}"
        if not y.numel():
            continue
        largest = y.abs().max().item()
        difference = (found[name].double() - y).abs().max().item()
        # Of what is nothing, rounding is left: of the other results, and of numbers near 1. NaN is a difference.
        if not difference <= tolerance * max(largest, overall / 100, 1e-3):
            return f"{name} differs from float64 by {difference:.3g}, its largest element being {largest:.3g}"
    return ""


def _results(run: Run, call: inspect.BoundArguments, wanted: list[str]) -> dict[str, Tensor]:
    for name, x in call.arguments.items():
        if name in wanted:
            x.requires_grad_()
    found = run(*call.args, **call.kwargs)
    if isinstance(found, Segment):
        named = {"state": found.state, "log_decay": found.log_decay, "decay": found.decay}
    else:
        results = found if isinstance(found, tuple) else (found,)
        named = {f"result {i}": y for i, y in enumerate(results)}
    if "logits" in call.arguments:
        named["the gradient of logits"] = call.arguments["logits"]  # which has been written there
    if "total" in call.arguments:
        named["the sum"] = call.arguments["total"]
    if "exp_avg" in call.arguments:
        named |= {name: call.arguments.get(name) for name in ("param", "exp_avg", "exp_avg_sq", "half")}
    return {name: y.byte() if y.dtype == torch.bool else y for name, y in named.items() if y is not None}


def _gradients(
    results: dict[str, Tensor], call: inspect.BoundArguments, wanted: list[str], incoming: dict[str, Tensor]
) -> dict[str, Tensor]:
    outputs = {name: y for name, y in results.items() if y.requires_grad}
    if not outputs:
        return {}
    inputs = [call.arguments[name] for name in wanted]
    found = torch.autograd.grad(
        [*outputs.values()],
        inputs,
        [incoming[name] for name in outputs],
        allow_unused=True,
        materialize_grads=True,
    )
    return {f"the gradient of {name}": x for name, x in zip(wanted, found, strict=True)}


def _sample(given: dict[str, Any], first: Tensor, noise: torch.Generator) -> dict[str, Any]:
    """Random arguments for those of a call, by their names in :mod:`linear_moe.kernels.ops`."""
    if "place" in given:
        return _sample_of_rows(given, noise)
    if "exp_avg" in given:
        return _sample_of_parameter(given, noise)
    if "total" in given:
        return _sample_of_experts(given, noise)
    is_packed = given.get("cu_seqlens") is not None

    def sample(name: str, x: Any) -> Any:
        if name == "state" and x is not None:
            if not isinstance(x, Tensor):  # on its way
                k, v = given["k"], given["v"]
                x = v.new_empty(1, v.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)
            return _random(name, x, (len(LENGTHS) if is_packed else 1, *x.shape[1:]), noise)
        if name == "combine" or not isinstance(x, Tensor):
            return None if callable(x) else x  # it would talk to other ranks
        if name == "cu_seqlens":
            return torch.tensor(
                [sum(LENGTHS[:n]) for n in range(len(LENGTHS) + 1)], dtype=x.dtype, device=x.device
            )
        if first.ndim == 2:
            num_rows = min(len(x), NUM_ROWS)
            if name == "labels":
                return torch.randint(given["logits"].shape[1], (num_rows,), generator=noise, device=x.device)
            return _random(name, x, (num_rows, *x.shape[1:]), noise)
        is_parameter = x.ndim < 3 or (name == "weight" and "activation" in given)
        if is_parameter or x.shape[:2] != first.shape[:2]:
            return _random(name, x, x.shape, noise)
        return _random(
            name, x, (1, NUM_TOKENS if is_packed else min(NUM_TOKENS, x.shape[1]), *x.shape[2:]), noise
        )

    return {name: sample(name, x) for name, x in given.items()}


def _sample_of_rows(given: dict[str, Any], noise: torch.Generator) -> dict[str, Any]:
    x, weight, (num_tokens, num_slots) = given["x"], given.get("weight"), given["place"].shape
    num_rows_each = len(x) // num_tokens
    num_tokens = min(num_tokens, NUM_ROWS)
    places = torch.randperm(num_tokens * num_slots, generator=noise, device=x.device)
    found = given | {"order": places.argsort(), "place": places.view(num_tokens, num_slots)}
    found["x"] = _random("x", x, (num_tokens * num_rows_each, *x.shape[1:]), noise)
    if weight is not None:
        found["weight"] = _random("weight", weight, (num_tokens, num_slots), noise)
    return found


def _sample_of_experts(given: dict[str, Any], noise: torch.Generator) -> dict[str, Any]:
    """Documents' lengths for the numbers of their tokens; nobody's tokens are none of any expert.

    Two experts, the second without tokens: weights may be large, and float64 has several copies of their gradients.
    """
    total, ends = given["total"], given["ends"]
    num_experts, num_rows = min(len(total), 2), NUM_TOKENS + 5
    found = given | {"ends": ends.new_tensor(LENGTHS[:num_experts]).cumsum(0, dtype=ends.dtype)}
    found["total"] = _random("total", total, (num_experts, *total.shape[1:]), noise)
    for name in ("dy", "x"):
        found[name] = _random(name, given[name], (num_rows, *given[name].shape[1:]), noise)
    return found


def _sample_of_parameter(given: dict[str, Any], noise: torch.Generator) -> dict[str, Any]:
    """The third of large steps: of a usual one, little is to be seen in the parameter."""
    tensors = ("param", "grad", "exp_avg", "exp_avg_sq", "half")
    found = given | {
        name: _random(name, given[name].view(-1), (min(given[name].numel(), NUM_ELEMENTS),), noise)
        for name in tensors
        if given.get(name) is not None
    }
    found["exp_avg_sq"].abs_()
    step = torch.full_like(given["step"], 3.0)
    return found | dict(step=step, lr=1.0, eps=0.1, weight_decay=0.2, factor=0.5)


def _random(name: str, like: Tensor, size: tuple[int, ...], noise: torch.Generator) -> Tensor:
    """Of a size, with strides and alignment of ``like``; decays of both kinds, beta in (0, 1), keys of length 0.5."""
    before = like.data_ptr() % 16 // like.element_size()
    extent = 1 + sum((n - 1) * stride for n, stride in zip(size, like.stride(), strict=True))
    memory = torch.empty(before + extent, dtype=like.dtype, device=like.device)
    if name.startswith("log_decay"):
        memory.uniform_(-6, 0, generator=noise)
    elif like.dtype == torch.bool:
        memory.random_(2, generator=noise)
    elif name == "beta":
        memory.uniform_(0, 1, generator=noise)
    else:
        memory.normal_(std=0.5 * size[-1] ** -0.5 if name in ("k", "a", "b") else 1, generator=noise)
    found = memory.as_strided(size, like.stride(), before)
    if name.startswith("log_decay") and len(size) > 2:
        once = found
        for dim, stride in enumerate(found.stride()):
            once = once.narrow(dim, 0, 1) if stride == 0 else once
        once[:, once.shape[1] // 2 :] *= 0.002  # chunks with weak decays go another way
    return found


def _wants_gradient(name: str, x: Any) -> bool:
    """A state that is on its way wants one as any."""
    return x.requires_grad if isinstance(x, Tensor) else name == "state" and callable(x)


def _double(x: Any) -> Any:
    return x.to(torch.float64, copy=True) if isinstance(x, Tensor) and x.is_floating_point() else x


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _versions() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    ptxas = triton.knobs.nvidia.ptxas.version
    return f"{device}, torch {torch.__version__}, triton {triton.__version__}, ptxas {ptxas}"

"""Every operation that a step gives to the GPU, noted on a machine without one: tensors have shapes and no memory.

Tensors are torch's fake ones and call themselves CUDA tensors, so that every branch on a device goes as it does there;
launches of Triton's kernels are noted instead of made. Autograd's engine alone is told that they are on the CPU: it
would look for a thread of their device.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from linear_moe.kernels import dispatch

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FREE = (
    "detach",
    "alias",
    "lift_fresh",
    "record_stream",
    "set_",
    "is_pinned",
    "_unsafe_view",
    "empty",
    "new_empty",
)
"""What operations are called, or begin with, that launch nothing; besides views."""
GATHERS = {"index_select": 0, "gather": 0, "embedding": 0, "index": 0}
"""Which input of an operation is read only where its index says."""
WRITES_ONLY = ("copy_", "fill_", "zero_", "_like", "new_")
"""In-place operations, and makers of tensors, that do not read what they are given."""
LAUNCHES = {"sort": 8, "topk": 3, "cumsum": 2}
"""Kernels of an operation that has several."""
IN_PLACE = {
    "cross_entropy_write_kernel": ("logits",),
    "adam_kernel": ("param", "exp_avg", "exp_avg_sq"),
    "grouped_weight_grad_kernel": ("total",),
}
"""What kernels of ours write where they read it, unless they are told not to add to it."""
CALLER = re.compile(r"/(linear_moe|megatron)/(.+\.py)$")
PASSED_ON = re.compile(
    r"kernels/(ops|dispatch|autocast|arriving|recompute)\.py|triton/layout\.py|/core/(utils|timers)\.py"
)
"""Files between an operation and who asked for it."""


@dataclass(frozen=True)
class Op:
    """What one operation takes."""

    name: str
    caller: str
    """``file:function`` that asked for it, or for the operation that this is the gradient of."""
    phase: str
    """forward, recomputed, backward."""
    moved: int
    """Bytes read and written."""
    flops: int
    launches: int
    is_triton: bool
    shapes: str


@dataclass
class Trace:
    """All of a step."""

    ops: list[Op] = field(default_factory=list)
    dispatched: int = 0
    """Operations of torch, those that launch nothing included."""
    live: int = 0
    """Bytes of all tensors on the device."""
    peak: int = 0
    flops: float = 0.0
    """Of the model, as counted for its MFU."""

    def begin(self) -> None:
        """What came before is no part of the step."""
        self.ops.clear()
        self.dispatched, self.peak = 0, self.live


class Recorder(TorchDispatchMode):
    """Notes what passes, inside a :class:`FakeTensorMode`."""

    def __init__(self) -> None:
        super().__init__()
        self.trace, self._known = Trace(), set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if func is torch.ops.prim.device.default:
            return CPU
        if kwargs.get("device") == CPU and torch._C._current_autograd_node() is not None:
            kwargs = {**kwargs, "device": CUDA}  # autograd asked a tensor for its device
        if name in ("uniform_", "normal_") or (name, func._overloadname) == ("addmm", "dtype_out"):
            out = kwargs.get("out", args[0])  # fake tensors cannot
        else:
            out = func(*args, **kwargs)
        if func.namespace in ("aten", "c10d"):
            self.trace.dispatched += 1
            self._note(func, name, args, kwargs, out)
        return out

    def _note(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        outputs, inputs = on_device(out), on_device((args, kwargs))
        for x in outputs:
            self._keep(x)
        places, written = {place(x)[0] for x in inputs}, mutated(func, args, kwargs)
        fresh = [x for x in outputs if place(x)[0] not in places]
        if not (fresh or written) or name.startswith(FREE):
            return
        is_same = name == "_to_copy" and bool(inputs) and inputs[0].dtype == out.dtype
        if is_same and inputs[0].device == out.device and kwargs.get("memory_format") is None:
            return  # C++ compared with the device that it was told
        reads = [x for x in unique(inputs) if not any(x is y for y in written)]
        if not any(part in name for part in WRITES_ONLY) and "out" not in func._overloadname:
            reads += written
        elif name != "copy_":
            reads = [x for x in reads if "out" in func._overloadname]
        moved = sum(map(size, reads)) + sum(map(size, fresh)) + sum(map(size, written))
        if name in GATHERS:
            moved += min(0, sum(map(size, fresh)) - size(on_device(args)[GATHERS[name]]))
        count = LAUNCHES.get(name, 1)
        self._add(name, moved, flops_of(func, name, args, kwargs, out), count, (*inputs, *fresh))

    def launch(self, kernel: Any, args: Any, kwargs: Any) -> None:
        """A launch of Triton's; every tensor is passed over once, or read and written."""
        bound = dict(zip([p.name for p in kernel.params], args)) | kwargs
        found = unique([x for x in bound.values() if isinstance(x, Tensor)])
        name, moved = kernel.fn.__name__, sum(map(size, found))
        if bound.get("ADD", True):
            moved += sum(size(bound[written]) for written in IN_PLACE.get(name, ()))
        self._add(name, moved, triton_flops(bound), 1, found, True)

    def read(self, x: Tensor) -> float | int:
        """Some number, where the host waits for one."""
        if x.is_cuda:
            self._add("item", x.element_size(), 0, 1, [x])
        return 2.0 if x.is_floating_point() else 1

    def _add(
        self, name: str, moved: int, flops: int, count: int, seen: Iterable[Tensor], is_triton: bool = False
    ) -> None:
        shapes = " ".join(f"{str(x.dtype)[6:]}{list(x.shape)}" for x in list(seen)[:8])
        self.trace.ops.append(Op(name, *caller_of(name), moved, flops, count, is_triton, shapes))

    def _keep(self, x: Tensor) -> None:
        storage, trace = x.untyped_storage(), self.trace
        key, num_bytes = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            trace.live += num_bytes
            trace.peak = max(trace.peak, trace.live)
            weakref.finalize(storage, self._drop, key, num_bytes)

    def _drop(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.trace.live -= num_bytes


@contextmanager
def recording() -> Iterator[Recorder]:
    """Tensors made within are fake; the recorder notes what is done with them."""
    recorder = Recorder()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        recorder.launch(self, args, kwargs)

    with ExitStack() as stack:
        enter, patch = stack.enter_context, mock.patch.object
        enter(patch(triton.runtime.jit.JITFunction, "run", run))
        enter(mock.patch("torch._subclasses.fake_tensor.init_gpu_context"))
        enter(patch(FakeTensor, "is_cuda", property(lambda x: x.fake_device.type == "cuda")))
        enter(patch(FakeTensor, "data_ptr", lambda x: x.storage_offset() * x.element_size()))
        enter(patch(dispatch, "_is_plain", lambda x: True))  # which keeps kernels from tensors without memory
        for name in ("item", "__float__"):
            enter(patch(FakeTensor, name, lambda x: recorder.read(x)))
        enter(torch.autograd.set_multithreading_enabled(False))
        enter(
            torch.autograd.set_detect_anomaly(True, check_nan=False)
        )  # gradients know who made what they are of
        enter(FakeTensorMode(allow_non_fake_inputs=True))
        enter(recorder)
        yield recorder


def on_device(x: Any) -> list[Tensor]:
    """All tensors there in nested lists and dicts."""
    if isinstance(x, Tensor):
        return [x] if x.is_cuda else []
    if isinstance(x, dict):
        x = list(x.values())
    return [t for y in x for t in on_device(y)] if isinstance(x, list | tuple) else []


def place(x: Tensor) -> tuple[Any, ...]:
    """Where it lies."""
    return x.untyped_storage()._cdata, x.storage_offset(), x.shape


def unique(found: list[Tensor]) -> list[Tensor]:
    """Those that lie in different places."""
    return list({place(x): x for x in found}.values())


def size(x: Tensor) -> int:
    """Bytes of what it refers to; what is expanded counts once."""
    count = 1
    for length, stride in zip(x.shape, x.stride(), strict=True):
        count *= length if stride else 1
    return count * x.element_size()


def mutated(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """What an operation writes in place."""
    found = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == "grads" and kwargs.get("grad_scale") is None:
            continue  # of torch's optimizers, which say that they write these, and do so only where they scale them
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += on_device(args[i] if i < len(args) else kwargs.get(argument.name))
    return unique(found)


def flops_of(func: Any, name: str, args: Any, kwargs: Any, out: Any) -> int:
    """Of matrix products and attention, which is causal."""
    if name == "_grouped_mm" or name in ("mm", "addmm"):
        a, b = args[name == "addmm" :][:2]
        return 2 * a.shape[0] * a.shape[1] * b.shape[-1]
    if name.startswith("_scaled_dot_product_flash_attention"):
        is_backward = name.endswith("backward")
        q, k, v = args[is_backward : 3 + is_backward]
        products = 5 if is_backward else 2  # of pairs of tokens
        return products * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (q.shape[3] + v.shape[3]) // 2
    counter = flop_registry.get(func.overloadpacket)
    return counter(*args, **kwargs, out_val=out) if counter else 0


def triton_flops(bound: dict[str, Any]) -> int:
    """Of a scan: products of a chunk among its tokens, and with the memory. Of experts' gradients."""
    if {"dy", "x", "O", "I"} <= bound.keys():
        return 2 * bound["dy"].numel() * int(bound["I"])
    if not {"DK", "DV", "C"} <= bound.keys():
        return 0
    k, v = bound["DK"], bound["DV"]
    rows = max(x.numel() // x.shape[-1] for x in bound.values() if isinstance(x, Tensor) and x.ndim == 4)
    return rows * (2 * bound["C"] * (k + v) + 4 * k * v)


def caller_of(name: str) -> tuple[str, str]:
    """``file:function`` of the package or of Megatron that asks for the running operation, and its phase."""
    node, frame, caller = torch._C._current_autograd_node(), sys._getframe(2), None
    phase = "forward" if node is None else "backward"
    while frame is not None:
        path, function = frame.f_code.co_filename, frame.f_code.co_name
        if function in ("_engine_run_backward", "custom_backward"):  # the second is Megatron's
            break
        if path.endswith("tensor_parallel/random.py") and function == "backward":
            phase = "recomputed" if caller else "backward"
            break
        caller = caller or _named(path, function)
        frame = frame.f_back
    if caller is not None or node is None:
        return caller or "?", phase
    if name == "add":
        return "gradients of several readers", phase
    lines = re.findall(r'File "([^"]+)", line \d+, in (\w+)', "".join(node.metadata.get("traceback_", [])))
    found = (_named(path, function) for path, function in reversed(lines))
    return next((caller for caller in found if caller), node.name()), phase


def _named(path: str, function: str) -> str | None:
    found = CALLER.search(path)
    return f"{found[2]}:{function}" if found and not PASSED_ON.search(path) else None

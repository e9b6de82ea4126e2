"""The CPU platform: lets the unmodified Megatron ``pretrain()`` run, in any layout, without a CUDA device.

Megatron-Core has no CPU path: it asserts ``torch.cuda.is_available()``, allocates on ``device="cuda"``, and forks the
CUDA RNG. ``activate`` replaces the names of torch that it reaches for, once, for the whole process, and nothing in
Megatron itself; ``patches()`` is the list, one line and one reason each. Collectives go over gloo. On a machine with a
CUDA device ``activate`` refuses, and nothing of this is active.

What is different while it is active:
  * ``torch.cuda.is_available()`` is true. Code of ours that picks a kernel asks the tensor (``x.is_cuda``).
  * The "cuda" RNG *is* torch's default generator, since that one draws for CPU tensors; checkpoints hold it twice.
  * ``Tensor.cuda()`` is the tensor itself, not a copy.
The patches are plain functions, so they hold in every thread and inside ``autograd.backward``. (A ``TorchFunctionMode``
would be local to its thread, and off while it handles ``backward``, hence off during activation recompute.) They do not
reach a process that is spawned. Do not pass ``--use-cpu-initialization``: it starts the experts of all expert-parallel
ranks equal.
"""

import importlib
import logging
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.jit._builtins
import torch.utils._device
import torch.utils.data.dataloader

from linear_moe.training import cpu_standins as standin

_active = False


@dataclass(frozen=True)
class Patch:
    """``owner.name = value``, because of `why`."""

    owner: Any
    name: str
    value: Any
    why: str


def is_active() -> bool:
    """Whether ``activate`` has been called in this process."""
    return _active


def needed() -> bool:
    """Whether this machine has no CUDA device, so that training needs the CPU platform."""
    return _active or not torch.cuda.is_available()


def activate() -> None:
    """Switch this process to the CPU platform, before or after Megatron is imported; a second call does nothing.

    Raises:
        ValueError: there is a CUDA device.
    """
    global _active
    if _active:
        return
    if not needed():
        raise ValueError(
            "the CPU platform was asked for on a machine with a CUDA device\n"
            "  why: it would move every tensor of the run to the CPU\n"
            "  try: leave the call out, or hide the devices: CUDA_VISIBLE_DEVICES='' <command>"
        )
    # The first optimizer imports it, and it indexes torch's functions by identity: let it see the real ones.
    importlib.import_module("torch._dynamo")
    for patch in patches():
        setattr(patch.owner, patch.name, patch.value)
        if (
            patch.owner is torch and patch.name != "compile"
        ):  # torch.jit.script resolves torch.zeros by identity
            torch.jit._builtins._register_builtin(patch.value, f"aten::{patch.name}")
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(standin.not_about_forks)
    # What an earlier import of Megatron has decorated would be traced now, against names that are not torch's any more.
    torch.compiler.set_stance("force_eager")
    _active = True


def patches() -> list[Patch]:
    """Every replacement that ``activate`` makes, in order; making the list changes nothing."""
    return [
        *_device_patches(),
        *_stream_patches(),
        *_memory_patches(),
        *_rng_patches(),
        *_factory_patches(),
        *_tensor_patches(),
        *_other_patches(),
    ]


def _device_patches() -> list[Patch]:
    rows = [
        ("is_available", standin.yes, "initialize_megatron asserts it"),
        ("device_count", standin.local_world_size, "with 0, no process group and no RNG tracker is made"),
        ("current_device", standin.local_rank, "a device argument everywhere, and part of f-strings"),
        ("set_device", standin.nothing, "initialize_megatron"),
        ("device", standin.NothingAround, "a context around kernels; torch itself asks isinstance"),
        ("get_device_name", standin.device_name, "logs"),
        ("get_device_capability", standin.device_capability, "checked by --moe-grouped-gemm"),
        ("get_device_properties", standin.device_properties, "architecture checks of validate_args"),
        ("is_bf16_supported", standin.yes, "the CPU has bfloat16"),
        ("_lazy_init", standin.nothing, "called before every CUDA query"),
    ]
    return [Patch(torch.cuda, *row) for row in rows]


def _stream_patches() -> list[Patch]:
    rows = [
        ("Stream", standin.Stream, "DDP wrapping, gradient buckets, token dispatcher"),
        ("Event", standin.Event, "timers, token dispatcher"),
        ("stream", standin.NothingAround, "DDP wrapping"),
        ("current_stream", standin.the_stream, "everywhere"),
        ("default_stream", standin.the_stream, "everywhere"),
        ("set_stream", standin.nothing, "CUDA graphs"),
        ("synchronize", standin.nothing, "timers, pipeline communication, checkpoints"),
        ("is_current_stream_capturing", standin.no, "torch.optim asks before every step"),
    ]
    streams = [Patch(torch.cuda, *row) for row in rows]
    return [*streams, Patch(torch.Tensor, "record_stream", standin.nothing, "token dispatcher")]


def _memory_patches() -> list[Patch]:
    rows = [
        ("max_memory_allocated", standin.peak_memory, "for what asks as on a GPU: resident memory"),
        ("max_memory_reserved", standin.peak_memory, "the same"),
        ("memory_allocated", standin.zero, "the memory report"),
        ("memory_reserved", standin.zero, "the memory report"),
        ("device_memory_used", standin.zero, "the memory report"),
        (
            "memory_stats",
            standin.memory_stats,
            "the peak-memory metric; --log-memory-to-tensorboard indexes it",
        ),
        ("mem_get_info", standin.memory_info, "free and total memory"),
        ("reset_peak_memory_stats", standin.nothing, "there is no such counter"),
    ]
    return [Patch(torch.cuda, *row) for row in rows]


def _rng_patches() -> list[Patch]:
    rows = [
        ("get_rng_state", standin.get_rng_state, "RNG tracker, checkpoints, recompute"),
        ("set_rng_state", standin.set_rng_state, "RNG tracker, checkpoints, recompute"),
        ("manual_seed", standin.manual_seed, "torch's own queues the seed for ever"),
        ("manual_seed_all", standin.manual_seed, "called by torch.manual_seed"),
        ("initial_seed", standin.initial_seed, "goes with manual_seed"),
        ("default_generators", standin.generators(), "the tracker sets states through it"),
        ("_lazy_call", standin.run_now, "wraps that; torch's own queues it for ever"),
    ]
    patches = [Patch(torch.cuda, *row) for row in rows]
    patches += [Patch(torch.cuda.random, *row) for row in rows[:2]]
    tracker = sys.modules.get("megatron.core.tensor_parallel.random")
    if tracker is not None:
        patches.append(Patch(tracker, "_lazy_call", standin.run_now, "imported by value"))
        patches.append(Patch(tracker, "_lazy_init", standin.nothing, "imported by value"))
    loader = torch.utils.data.dataloader._BaseDataLoaderIter
    draws = "draws from the default generator, on some ranks only; starts a thread that pins memory"
    return [*patches, Patch(loader, "__init__", standin.data_iterator(loader.__init__), draws)]


def _factory_patches() -> list[Patch]:
    """Every function of torch with a ``device=`` argument; torch keeps the list for ``with torch.device(...)``."""
    constructors = {make.__name__ for make in torch.utils._device._device_constructors()}
    likes = {name for name in dir(torch) if name.endswith("_like") and not name.startswith("_")}
    names = sorted(name for name in constructors | likes if hasattr(torch, name))
    why = "device='cuda' and pin_memory=True"
    return [Patch(torch, name, standin.factory(getattr(torch, name)), why) for name in names]


def _tensor_patches() -> list[Patch]:
    tensor, why = torch.Tensor, "device='cuda'"
    makers = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")
    return [
        Patch(tensor, "to", standin.tensor_to(tensor.to), why),
        Patch(tensor, "cuda", standin.itself, "batches, rotary tables, checkpoints"),
        Patch(tensor, "pin_memory", standin.itself, "batches, rotary tables"),
        Patch(
            tensor,
            "type",
            standin.tensor_type(tensor.type),
            "optimizers compare with 'torch.cuda.FloatTensor'",
        ),
        *(Patch(tensor, name, standin.factory(getattr(tensor, name)), why) for name in makers),
    ]


def _other_patches() -> list[Patch]:
    context = torch.utils._device.DeviceContext
    return [
        Patch(
            context, "__init__", standin.device_context(context.__init__), "with torch.device('cuda'): (YaRN)"
        ),
        Patch(torch, "compile", standin.uncompiled, "jit_fuser: a C++ compiler, and minutes of warm-up"),
        Patch(
            dist, "all_to_all_single", standin.all_to_all_single(dist.all_to_all_single), "sizes in tensors"
        ),
        Patch(dist, "all_gather", standin.all_gather(dist.all_gather), "unequal shapes (EP and ETP > 1)"),
    ]

"""What Megatron and torch ask of CUDA, answered without it: as on the CPU platform, but tensors stay what they are."""

from __future__ import annotations

import contextlib
import importlib
from types import SimpleNamespace
from typing import Any

import torch

PROPERTIES = SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30
)


def one_h100() -> None:
    """For the rest of the process there is one; to be called before Megatron is imported."""
    # It indexes functions of torch by identity: let it see the real ones.
    importlib.import_module("torch._dynamo")
    from linear_moe.training import cpu

    patches = [*cpu._device_patches(), *cpu._stream_patches(), *cpu._memory_patches(), *cpu._rng_patches()]
    replacements = [(patch.owner, patch.name, patch.value) for patch in patches] + [
        (torch.cuda, "get_device_capability", lambda device=None: (PROPERTIES.major, PROPERTIES.minor)),
        (torch.cuda, "get_device_properties", lambda device=None: PROPERTIES),
        (torch.cuda, "device_of", cpu.standin.NothingAround),
        (torch.distributed, "all_gather_object", _own_object),
        (torch, "tensor", _from_host(torch.tensor)),
        (torch.Tensor, "type", cpu.standin.tensor_type(torch.Tensor.type)),
        (torch.nn.Module, "_apply", _apply),
        # What is compiled here is element-wise, and nothing of it but sums without dropout is left in a step.
        (torch, "compile", cpu.standin.uncompiled),
    ]
    for owner, name, value in replacements:
        setattr(owner, name, value)


def one_rank() -> None:
    """A process group of this process alone; reductions in place, for which NCCL launches nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    buffers: Any = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    buffers._coalescing_manager = lambda *args, **kwargs: contextlib.nullcontext()
    buffers.dist_reduce_scatter_func = buffers.dist_all_gather_func = lambda *args, **kwargs: None


def _apply(self: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
    """``Module.cuda`` and ``Module.to`` without exchanging what is in a parameter, which fake ones cannot."""
    for child in self.children() if recurse else ():
        child._apply(fn)
    with torch.no_grad():
        for name, x in self._parameters.items():
            y = x if x is None else fn(x)
            if y is not x and (y.dtype, y.device) != (x.dtype, x.device):
                new = torch.nn.Parameter(y, x.requires_grad)
                new.__dict__.update({key: z for key, z in x.__dict__.items() if key not in new.__dict__})
                self._parameters[name] = new
        for name, x in self._buffers.items():
            self._buffers[name] = None if x is None else fn(x)
    return self


def _own_object(found: list[Any], own: Any, group: Any = None) -> None:
    found[0] = own


def _from_host(make: Any) -> Any:
    """``torch.tensor``, which would give its numbers to the driver; those of tensors are read one by one."""

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        made = make(_numbers(data), *args, **kwargs)
        return made if device is None else torch.zeros(made.shape, dtype=made.dtype, device=device)

    return tensor


def _numbers(data: Any) -> Any:
    if isinstance(data, list | tuple):
        return [_numbers(x) for x in data]
    return data.item() if isinstance(data, torch.Tensor) and data.is_cuda else data

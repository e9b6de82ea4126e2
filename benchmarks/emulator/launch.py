"""Launches of Triton's kernels on the emulator, instead of a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from compile_check import compiling_only

from emulator.machine import Machine
from emulator.memory import Global, Shared
from emulator.ptx import Program, translate


@contextmanager
def emulated(arch: int = 90) -> Iterator[set[str]]:
    """Kernels launched within run on their CPU tensors as compiled for ``arch``; the set gets every hazard.

    One architecture for each process: Triton keeps what it compiled for its one device.
    """
    hazards: set[str] = set()
    with compiling_only("", arch):
        compile_only = triton.runtime.jit.JITFunction.run

        def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            kernel = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
            bound = next(iter(self.device_caches.values()))[4](*args, **kwargs)[0]
            values = [bound[name] for name, kind in kernel.src.signature.items() if kind != "constexpr"]
            launch(kernel.asm["ptx"], kernel.metadata.shared, grid, values, hazards)
            return kernel

        with mock.patch.object(triton.runtime.jit.JITFunction, "run", run), np.errstate(all="ignore"):
            yield hazards


def launch(ptx: str, shared: int, grid: tuple[int, ...], values: list[Any], hazards: set[str]) -> None:
    """All programs, one after the other; ``values`` are tensors and numbers, in the order of the parameters."""
    program = _translated(ptx)
    parameters = {name: _bits(kind, 0) for kind, name in program.parameters}
    parameters |= {name: _bits(kind, value) for (kind, name), value in zip(program.parameters, values)}
    memory = Global([x for x in values if torch.is_tensor(x)], hazards)
    size = (*grid, 1, 1)[:3]
    for z, y, x in itertools.product(*map(range, reversed(size))):
        memory.begin()
        machine = Machine(program.num_threads, Shared(shared, hazards), memory, (x, y, z), size)
        program.run(machine, parameters)


@cache
def _translated(ptx: str) -> Program:
    return translate(ptx)


def _bits(kind: str, value: Any) -> Any:
    if torch.is_tensor(value):
        return np.uint64(value.data_ptr())
    if kind == "f32":
        return np.float32(value).view(np.uint32)
    wide = kind.endswith("64")
    return (np.uint64 if wide else np.uint32)(int(value) & (2**64 - 1 if wide else 2**32 - 1))

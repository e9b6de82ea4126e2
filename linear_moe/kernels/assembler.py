"""The ptxas that assembles fused kernels for Hopper: Triton 3.6 brings 12.8, with which they compute wrongly there.

On an H100, gradients of the delta rules came out wrong, or other programs' shared memory was written, with 12.8; the
same code is right with 13.0 and 13.5 (docs/kernels.md). NVIDIA names two such defects that 12.9 has: registers that an
asynchronous product has yet to read are reused (right since 13.3, triton-lang/triton#11781), and addresses of shared
memory (right since 13.1, fla-org/flash-linear-attention#1262).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

ENVIRONMENT_VARIABLE = "TRITON_PTXAS_PATH"
"""Triton's own: which assembler it runs."""

OLDEST = (13, 3)
"""The first release without known defects on Hopper."""

TOO_NEW = (14,)
"""Drivers of CUDA 13 do not load what it makes."""

PACKAGE = "nvidia-cuda-nvcc"


@cache
def obstacle() -> str | None:
    """Why kernels for Hopper cannot be assembled rightly, in a few words; ``None``: they can.

    Points Triton to a newer ptxas where the one it would run is too old: the one of the package ``nvidia-cuda-nvcc``,
    else a CUDA toolkit's. So it does where ``TRITON_PTXAS_PATH`` names an old one: torch.compile sets it to the 13.0
    that torch brings.
    """
    path, theirs = _of_triton()
    if theirs >= OLDEST:
        os.environ.setdefault(ENVIRONMENT_VARIABLE, path)  # else torch.compile would name an old one
        return None
    why = (
        f"ptxas {_text(theirs)} miscompiles them for this GPU" if path else "Triton finds no ptxas that runs"
    )
    if torch.version.cuda is None or _numbers(torch.version.cuda) < (13, 0):
        # what a ptxas of CUDA 13 makes, drivers of CUDA 12 do not load
        return f"{why}, and this torch is for CUDA {torch.version.cuda}: install one for CUDA 13"
    for path in _candidates():
        if OLDEST <= version(path) < TOO_NEW:
            os.environ[ENVIRONMENT_VARIABLE] = path
            _forget_versions()
            if _of_triton()[1] < OLDEST:
                return f"{why}, and it was set in Python: leave triton.knobs.nvidia.ptxas as it is"
            return None
    return f"{why}: pip install '{PACKAGE}>={_text(OLDEST)},<{_text(TOO_NEW)}'"


def _of_triton() -> tuple[str, tuple[int, ...]]:
    """Path and version of the one that it would run; ``""`` and ``(0,)``: there is none."""
    # Only now: it takes a second; not as a statement: transformers asks for what an exported model's files import.
    knobs: Any = importlib.import_module("triton.knobs")
    try:
        return knobs.nvidia.ptxas.path, _numbers(knobs.nvidia.ptxas.version)
    except (RuntimeError, OSError):
        return "", (0,)


def version(path: str) -> tuple[int, ...]:
    """Of a ptxas: ``(13, 3)``; ``(0,)`` where it does not run."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return (0,)
    found = re.search(r"release (\d+\.\d+)", said)
    return _numbers(found[1]) if found else (0,)


def _candidates() -> Iterator[str]:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    yield from (str(file.locate()) for file in files if file.name == "ptxas")
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        yield os.path.join(home, "bin", "ptxas")
    if on_path := shutil.which("ptxas"):
        yield on_path
    yield "/usr/local/cuda/bin/ptxas"


def _forget_versions() -> None:
    """Triton asks for the version once, and files compiled kernels under it: those of the old one stay there."""
    compiler: Any = sys.modules.get("triton.backends.nvidia.compiler")
    if compiler is not None:
        for cached in (compiler.get_ptxas_version, compiler.CUDABackend.hash):
            if hasattr(cached, "cache_clear"):  # whatever a later Triton does
                cached.cache_clear()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(".")[:2])


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))

"""Kernels for Hopper are assembled by a ptxas that does so rightly, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton

from linear_moe.kernels import assembler, dispatch

NAME = assembler.ENVIRONMENT_VARIABLE


def make_ptxas(folder: Path, version: str) -> str:
    folder.mkdir(parents=True)
    path = folder / "ptxas"
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.9'\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's own one is old, no other is installed, and nothing is remembered."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(assembler, "_candidates", lambda: iter(()))
    with mock.patch.dict(os.environ):
        os.environ.pop(NAME, None)
        assembler.obstacle.cache_clear()
        yield
    assembler.obstacle.cache_clear()


def test_the_shipped_one_is_refused() -> None:
    why = assembler.obstacle()
    assert why is not None and "pip install 'nvidia-cuda-nvcc>=13.3,<14'" in why and NAME not in os.environ


def test_the_first_new_one_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, next_major, new, newer = (make_ptxas(tmp_path / v, v) for v in ("13.2", "14.0", "13.3", "13.9"))
    found = [str(tmp_path / "absent"), old, next_major, new, newer]
    monkeypatch.setattr(assembler, "_candidates", lambda: iter(found))
    from triton.backends.nvidia import compiler

    before = compiler.get_ptxas_version(90)
    assert assembler.obstacle() is None and os.environ[NAME] == new
    assert triton.knobs.nvidia.ptxas.version == "13.3"
    assert "13.3" in compiler.get_ptxas_version(90) != before, "compiled kernels are filed by what made them"
    del os.environ[NAME]
    compiler.get_ptxas_version.cache_clear()


@pytest.mark.parametrize("version, is_right", [("13.2", False), ("13.3", True)])
def test_the_named_one_stays_unless_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, is_right: bool
) -> None:
    """torch.compile names torch's own, 13.0, in any process in which it compiles."""
    named, new = make_ptxas(tmp_path / "named", version), make_ptxas(tmp_path / "new", "13.9")
    monkeypatch.setenv(NAME, named)
    monkeypatch.setattr(assembler, "_candidates", lambda: iter([new]))
    assert assembler.obstacle() is None
    assert os.environ[NAME] == (named if is_right else new)


def test_torch_compile_has_nothing_to_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names torch's own where nothing is named."""
    path = make_ptxas(tmp_path / "bundled", "13.4")
    monkeypatch.setattr(assembler, "_of_triton", lambda: (path, (13, 4)))
    assert assembler.obstacle() is None and os.environ[NAME] == path


def test_one_that_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, str(tmp_path))
    why = assembler.obstacle()
    assert why is not None and "finds no ptxas that runs" in why and "pip install" in why
    new = make_ptxas(tmp_path / "new", "13.3")
    monkeypatch.setattr(assembler, "_candidates", lambda: iter([new]))
    assembler.obstacle.cache_clear()
    assert assembler.obstacle() is None and os.environ[NAME] == new


def test_an_old_one_that_python_chose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable changes that."""
    monkeypatch.setattr(assembler, "_candidates", lambda: iter([make_ptxas(tmp_path / "new", "13.3")]))
    triton.knobs.nvidia.ptxas = make_ptxas(tmp_path / "old", "12.9")
    try:
        why = assembler.obstacle()
    finally:
        del triton.knobs.nvidia.ptxas
    assert why is not None and "leave triton.knobs.nvidia.ptxas as it is" in why


def test_drivers_of_cuda_12_do_not_load_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(assembler, "_candidates", lambda: iter([make_ptxas(tmp_path / "new", "13.3")]))
    why = assembler.obstacle()
    assert why is not None and "torch is for CUDA 12.8" in why and NAME not in os.environ


def test_the_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert next(assembler._candidates()).endswith("nvidia/cu13/bin/ptxas")
    assert assembler.version(next(assembler._candidates())) >= assembler.OLDEST


@pytest.mark.parametrize("capability, is_refused", [((8, 0), False), ((9, 0), True), ((12, 0), False)])
def test_only_on_hopper(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], is_refused: bool
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    why = dispatch._fused(torch.device("cuda"), torch.bfloat16)
    assert (why is not None and "ptxas" in why) == is_refused

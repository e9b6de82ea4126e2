"""Kernels in programs that trace, and with tensors that are not memory: fused ones keep out of the way."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from linear_moe import kernels
from linear_moe.kernels import dispatch

CUDA, HALF = torch.device("cuda"), torch.bfloat16


class Layer(torch.nn.Module):
    """What a mixer is made of."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, H, K]`` to the same."""
        y, _ = kernels.short_conv(x, x[0, :4].movedim(0, -1))
        y, _ = kernels.rotate_heads(y, x, x[:, :, 0, :3].detach())
        y, _ = kernels.delta_rule(y, y, y, y[..., 0].sigmoid(), -y[..., 1].abs())
        return kernels.gated_rms_norm(y, gate=x)


def alone(act: Callable[[], None]) -> None:
    """In a process of its own: what trains on a CPU here leaves torch a compiler that compiles nothing."""
    program = f"import test_traced; test_traced.{act.__name__}()"
    paths = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[2])))
    environment = {**os.environ, "PYTHONPATH": paths}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=200
    )
    assert run.returncode == 0, run.stderr[-3000:]


def test_compilers_are_not_imported() -> None:
    """Seconds; and whoever sets TRITON_INTERPRET does so before Triton is imported."""
    program = (
        "import sys; from linear_moe import kernels; print({'triton', 'torch._dynamo'} & {*sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert run.stdout == "set()\n", run.stdout + run.stderr[-3000:]


def test_without_gradients_a_model_is_one_graph() -> None:
    alone(without_gradients)


def without_gradients() -> None:
    """Exports a layer."""
    x = torch.randn(1, 12, 1, 8) * 0.3
    with torch.no_grad():
        graph = torch.export.export(Layer(), (x,), strict=True).module()
        assert torch.equal(graph(x), Layer()(x))


def test_with_gradients_every_operation_is_between_graphs() -> None:
    alone(with_gradients)


def with_gradients() -> None:
    """Compiles a layer, and looks for why the compiler stopped."""
    from torch._dynamo.utils import counters

    x = torch.randn(1, 12, 1, 8).mul_(0.3).requires_grad_()
    compiled = torch.compile(Layer(), backend="eager")(x)
    (found,) = torch.autograd.grad(compiled.sum(), x)
    (expected,) = torch.autograd.grad(Layer()(x).sum(), x)
    assert torch.equal(found, expected)
    assert {reason.partition("\n")[0] for reason in counters["graph_break"]} == {
        "Skip calling `torch.compiler.disable()`d function"
    }


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize("value", ["1", "true", "ON", "yes", "y"])
def test_an_interpreter_is_not_taken_for_a_gpu(
    value: str, on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dispatch._fused(CUDA, HALF) is None
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert dispatch._fused(CUDA, HALF)


def test_a_gpu_of_another_make_runs_torch(on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert dispatch._fused(CUDA, HALF)


def test_on_a_cpu_nobody_looks_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_has_triton", lambda: pytest.fail("looked"))
    assert dispatch._fused(torch.device("cpu"), torch.float32)


def test_tensors_without_memory_run_torch(on_a_gpu: None) -> None:
    fused = dispatch.BACKENDS["weighted_swiglu"][0]
    plain = torch.zeros(3, 4), torch.nn.Parameter(torch.zeros(3))
    with FakeTensorMode():
        fake = torch.zeros(3, 4), torch.zeros(3)
    assert fused.name == "triton" and fused.takes(*plain)
    assert not fused.takes(*fake) and not fused.takes(plain[0], fake[1])

"""The fused segments on a CUDA device: against the token loop in float64 on the CPU, forward and every gradient."""

import pytest
import torch
from gpu_checks import DIMS, LAYOUTS, RMS, captured, check_segment, more_of, never_waiting, on_gpu
from scan_cases import PACKED, Inputs, make, poison_empty
from triton_segment_cases import DELTA, DIAG

from linear_moe import kernels

pytestmark = pytest.mark.gpu

SEGMENTS = {**DIAG, **DELTA}


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.setenv("LINEAR_MOE_KERNELS", "triton")
    poison_empty(monkeypatch)


def segment_inputs(kind: str, strength: float = 0.1, **sizes: int) -> Inputs:
    op, decay, extra = SEGMENTS[kind]
    return make(op, decay, extra=extra, strength=strength, **sizes)


@pytest.mark.parametrize("dtype", RMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", SEGMENTS)
def test_fused_segment_layouts(kind, layout, dtype, fused):
    check_segment(segment_inputs(kind, num_keys=64, num_values=48, **LAYOUTS[layout]), dtype)


@pytest.mark.parametrize("dtype", RMS)
@pytest.mark.parametrize(("num_keys", "num_values"), DIMS)
@pytest.mark.parametrize(
    "kind", ["none", "scalar", "vector", "values", "delta none", "delta scalar", "delta vector"]
)
def test_fused_segment_dims_and_groups(kind, num_keys, num_values, dtype, fused):
    sizes = dict(num_keys=num_keys, num_values=num_values, num_heads=4, groups=2, num_tokens=130)
    check_segment(segment_inputs(kind, **sizes), dtype, more_of(sizes["num_keys"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["scalar", "vector", "values", "delta scalar", "delta vector"])
def test_fused_segment_long(kind, dtype, fused):
    sizes = dict(num_keys=128, num_values=128, num_heads=1, groups=1, batch=1, num_tokens=4096)
    check_segment(segment_inputs(kind, strength=0.002, **sizes), dtype)


@pytest.mark.parametrize("kind", ["scalar", "vector", "values", "delta scalar", "delta vector"])
def test_fused_segment_same_bits_in_a_graph_and_no_waiting(kind, fused):
    inputs = segment_inputs(kind, num_tokens=230, num_keys=64, num_values=64, cu_seqlens=PACKED)
    inputs = on_gpu(inputs.to(torch.bfloat16))

    def step():
        leaves = inputs.differentiable()
        segment = leaves.segment(kernels)
        found = [x for x in (segment.state, segment.log_decay, segment.decay) if x is not None]
        used = [x for name, x in leaves.tensors.items() if x.requires_grad and name not in ("q", "state")]
        return *found, *torch.autograd.grad(sum(x.square().sum() for x in found), used)

    eager = step()  # compiles
    with never_waiting():
        again = step()
    for x, y, z in zip(eager, again, captured(step), strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)

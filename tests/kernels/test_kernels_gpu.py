"""The same kernels on a CUDA device: against the token loop in float64 on the CPU, forward and every gradient."""

import pytest
import torch
from scan_cases import OPS

from linear_moe import kernels
from linear_moe.kernels import reference, short_conv

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DECAYS = {
    "none": lambda shape: None,
    "scalar": lambda shape: -torch.rand(shape[:3], dtype=torch.float64),
    "vector": lambda shape: -torch.rand(shape, dtype=torch.float64),
}


def inputs(op, decay, packed):
    torch.manual_seed(0)
    B, T, H, K, V = (1, 193, 2, 32, 48) if packed else (2, 193, 2, 32, 48)
    unit = lambda *s: torch.nn.functional.normalize(torch.randn(*s, dtype=torch.float64), dim=-1)  # noqa: E731
    tensors = {
        "q": unit(B, T, H, K),
        "k": unit(B, T, H, K),
        "v": torch.randn(B, T, H, V, dtype=torch.float64),
    }
    if op == "delta_rule":
        tensors["beta"] = torch.rand(B, T, H, dtype=torch.float64)
    if op == "dplr_delta_rule":
        removed = unit(B, T, H, K)
        tensors["a"], tensors["b"] = -removed, removed * torch.rand(B, T, H, K, dtype=torch.float64)
    log_decay = DECAYS[decay]((B, T, H, K))
    if log_decay is not None:
        tensors["log_decay"] = log_decay
    cu_seqlens = torch.tensor([0, 5, 5, 130, T]) if packed else None
    return tensors, cu_seqlens


def run(fn, tensors, cu_seqlens, device, dtype):
    leaves = {name: x.detach().to(device, dtype).clone().requires_grad_() for name, x in tensors.items()}
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(device)
    o, state = fn(**leaves, scale=0.5, cu_seqlens=cu_seqlens)
    (o.double().sin().sum() + state.double().cos().sum()).backward()
    return [o, state, *(x.grad for x in leaves.values())]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("op", OPS)
def test_cuda_equals_the_token_loop(op, decay, packed, dtype):
    fast, loop = getattr(kernels, op), getattr(reference, op)
    tensors, cu_seqlens = inputs(op, decay, packed)
    tensors = {
        name: x.to(dtype).double() for name, x in tensors.items()
    }  # both start from the rounded inputs
    expected = run(loop, tensors, cu_seqlens, "cpu", torch.float64)
    found = run(fast, tensors, cu_seqlens, "cuda", dtype)
    for a, b in zip(found, expected, strict=True):
        error = (a.detach().cpu().double() - b.detach()).norm() / b.detach().norm()
        assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_short_convolution_on_cuda(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 65, 3, 8, dtype=dtype), torch.randn(3, 8, 4, dtype=dtype)
    expected, _ = short_conv(x.double(), weight.double(), activation="silu")
    found, _ = short_conv(x.cuda(), weight.cuda(), activation="silu")
    assert (found.cpu().double() - expected).norm() / expected.norm() <= TOLERANCE[dtype]

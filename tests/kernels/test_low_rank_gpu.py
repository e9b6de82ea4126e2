"""RWKV7's rule, fused, on a CUDA device: against the token loop in float64 on the CPU, forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from gpu_checks import (
    DIMS,
    LAYOUTS,
    OF_DELTA_RULES,
    RMS,
    captured,
    check_segment,
    fused_errors,
    never_waiting,
    on_gpu,
)
from scan_cases import PACKED, Inputs, make, poison_empty
from torch import Tensor
from triton_dplr_cases import one_key, unrelated

from linear_moe import kernels

pytestmark = pytest.mark.gpu

OP = "dplr_delta_rule"
WEAK = 1.25
"""Of the limits, where all decays are weak: docs/kernels_dplr.md."""


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEAR_MOE_KERNELS", "triton")
    poison_empty(monkeypatch)


def check(inputs: Inputs, dtype: torch.dtype, more: float = 1.0, without: tuple[str, ...] = ()) -> None:
    """Relative RMS errors; whatever the decay, rows decay by themselves, and are rounded once more."""
    of_outputs, of_gradients = OF_DELTA_RULES[dtype]
    errors = fused_errors(inputs, dtype)
    limits = {n: more * (of_gradients if n.startswith("grad") else of_outputs) for n in errors}
    assert all(e <= limits[n] for n, e in errors.items() if n not in without), errors


@pytest.mark.parametrize("dtype", RMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("decay", ["none", "head", "scalar", "vector"])
def test_layouts(decay: str, layout: str, dtype: torch.dtype) -> None:
    sizes = dict(num_keys=64, num_values=48, strength=0.1, **LAYOUTS[layout])
    check(make(OP, decay, **sizes), dtype)


@pytest.mark.parametrize("dtype", RMS)
@pytest.mark.parametrize(("num_keys", "num_values"), DIMS)
def test_dims_and_groups(num_keys: int, num_values: int, dtype: torch.dtype) -> None:
    sizes = dict(num_keys=num_keys, num_values=num_values, num_heads=4, groups=2, num_tokens=130)
    check(make(OP, "vector", strength=0.3, **sizes), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 16], ids=["in pieces", "whole rows"])
def test_long(heads: int, dtype: torch.dtype) -> None:
    sizes = dict(num_keys=64, num_values=64, num_heads=heads, groups=heads, batch=1, num_tokens=4096)
    check(make(OP, "vector", strength=0.02, **sizes), dtype, WEAK)


EXTREMES = {
    "one key": one_key,
    "unrelated": unrelated,
    "weak": lambda tensors: tensors["log_decay"].fill_(-1e-3),
    "fastest of RWKV7": lambda tensors: tensors["log_decay"].fill_(-0.6065),
    "e^-30": lambda tensors: tensors["log_decay"].fill_(-30.0),
    "forgets all": lambda tensors: tensors["log_decay"].fill_(float("-inf")),
    "now and then": lambda tensors: tensors["log_decay"][:, 10:300:7].fill_(-30.0),
}


@pytest.mark.parametrize("dtype", RMS)
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes(extreme: str, dtype: torch.dtype) -> None:
    """As of the delta rule: float16 holds no e^-30, and what every token erases of the one before it cancels."""
    sizes = dict(num_tokens=330, batch=1, groups=1, num_heads=2, num_keys=64, num_values=64, strength=0.3)
    inputs = make(OP, "vector", **sizes)
    EXTREMES[extreme](inputs.tensors)
    is_lost = dtype == torch.float16 and extreme == "e^-30"
    more = {"one key": 8.0, "weak": WEAK}.get(extreme, 1.0) if dtype.itemsize == 2 else 1.0
    check(inputs, dtype, more, ("grad log_decay", "grad state") if is_lost else ())


@pytest.mark.parametrize("dtype", RMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("decay", ["none", "vector"])
def test_segments(decay: str, layout: str, dtype: torch.dtype) -> None:
    sizes = dict(num_keys=64, num_values=48, strength=0.1, **LAYOUTS[layout])
    check_segment(make(OP, decay, **sizes), dtype)


def step(tensors: dict[str, Tensor]) -> list[Tensor]:
    """Everything that both operations compute."""
    leaves = Inputs(OP, tensors).differentiable()
    o, state = leaves.run(kernels)
    y = o.float().square().sum() + state.square().sum()
    of_scan = torch.autograd.grad(y, list(leaves.tensors.values()))
    segment = leaves.segment(kernels)
    y = segment.state.square().sum() + segment.decay.square().sum()
    used = [x for name, x in leaves.tensors.items() if name not in ("q", "state")]
    return [o, state, *of_scan, segment.state, segment.decay, *torch.autograd.grad(y, used)]


def test_strided_deterministic_in_a_graph_and_no_waiting() -> None:
    """Slices of one projection in [T, B, ...] order; the same bits from every run, captured in a CUDA graph or not."""
    inputs = make(OP, "vector", num_tokens=300, num_keys=64, num_values=64, groups=4, strength=0.1)
    tensors = {name: x.cuda() for name, x in inputs.to(torch.bfloat16).tensors.items()}
    contiguous = {name: x.clone() for name, x in tensors.items()}
    names = ("q", "k", "v", "a", "b")
    fused_TBHP = torch.cat([tensors[name] for name in names], -1).transpose(0, 1).contiguous()
    tensors.update(zip(names, (x.transpose(0, 1) for x in fused_TBHP.split(64, -1)), strict=True))
    eager, copied = step(tensors), step(contiguous)  # compile
    with never_waiting():
        again = step(tensors)
    for x, *others in zip(eager, again, copied, captured(lambda: step(tensors)), strict=True):
        assert all(torch.equal(x, y) for y in others)


def test_packed_documents_never_wait_for_the_device() -> None:
    inputs = make(OP, "vector", num_tokens=210, cu_seqlens=PACKED).to(torch.float32)
    inputs = on_gpu(inputs).differentiable()
    sum(x.sum() for x in inputs.run(kernels)).backward()  # compiles
    with never_waiting():
        sum(x.sum() for x in inputs.run(kernels)).backward()

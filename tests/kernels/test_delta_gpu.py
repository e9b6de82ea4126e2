"""The fused delta rule on a CUDA device: against the token loop in float64 on the CPU, forward and every gradient."""

import pytest
import torch
from fused_scans import repeated_keys
from gpu_checks import (
    DIMS,
    LAYOUTS,
    OF_DELTA_RULES,
    RMS,
    captured,
    check_fused,
    fused_errors,
    more_of,
    never_waiting,
    on_gpu,
)
from scan_cases import DECAYS, PACKED, Inputs, make, poison_empty

from linear_moe import kernels

pytestmark = pytest.mark.gpu


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.setenv("LINEAR_MOE_KERNELS", "triton")
    poison_empty(monkeypatch)


@pytest.mark.parametrize("dtype", RMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("decay", DECAYS)
def test_fused_delta_layouts(decay, layout, dtype, fused):
    sizes = dict(num_keys=64, num_values=48, strength=0.1, **LAYOUTS[layout])
    check_fused(make("delta_rule", decay, **sizes), dtype)


@pytest.mark.parametrize("dtype", RMS)
@pytest.mark.parametrize(("num_keys", "num_values"), DIMS)
def test_fused_delta_dims_and_groups(num_keys, num_values, dtype, fused):
    sizes = dict(num_keys=num_keys, num_values=num_values, num_heads=4, groups=2, num_tokens=130)
    for decay in ("none", "scalar", "vector"):
        check_fused(make("delta_rule", decay, strength=0.3, **sizes), dtype, more_of(num_keys))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_fused_delta_long(decay, dtype, fused):
    sizes = dict(num_keys=128, num_values=128, num_heads=1, groups=1, batch=1, num_tokens=4096)
    check_fused(make("delta_rule", decay, strength=0.02, **sizes), dtype)


EXTREMES = {
    "beta 0": lambda tensors: tensors["beta"].fill_(0.0),
    "beta 1": lambda tensors: tensors["beta"].fill_(1.0),
    "repeated keys": repeated_keys,
    "weak": lambda tensors: tensors["log_decay"].fill_(-1e-3),
    "e^-30": lambda tensors: tensors["log_decay"].fill_(-30.0),
    "forgets all": lambda tensors: tensors["log_decay"].fill_(float("-inf")),
    "now and then": lambda tensors: tensors["log_decay"][:, 10:300:7].fill_(-30.0),
}


@pytest.mark.parametrize("dtype", RMS)
@pytest.mark.parametrize("decay", ["scalar", "vector"])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_fused_delta_extremes(extreme, decay, dtype, fused):
    """float16 holds no number as small as e^-30 and its products: gradients of such decays are 0 there.

    Where every token erases all that the one before it wrote, chunks sum what cancels, each rounded: 8 times the error.
    """
    sizes = dict(num_tokens=330, batch=1, groups=1, num_heads=2, num_keys=64, num_values=64, strength=0.01)
    inputs = make("delta_rule", decay, **sizes)
    EXTREMES[extreme](inputs.tensors)
    errors = fused_errors(inputs, dtype)
    if dtype == torch.float16 and extreme == "e^-30":
        errors = {n: e for n, e in errors.items() if n not in ("grad log_decay", "grad state")}
    more = 8 if extreme == "repeated keys" and dtype.itemsize == 2 else 1
    limits = {n: more * OF_DELTA_RULES[dtype][n.startswith("grad")] for n in errors}
    assert all(e <= limits[n] for n, e in errors.items()), errors


@pytest.mark.parametrize("decay", DECAYS)
def test_fused_delta_strided_deterministic_and_in_a_graph(decay, fused):
    """Slices of one projection in [T, B, ...] order; the same bits from every run, captured in a CUDA graph or not."""
    inputs = make("delta_rule", decay, num_tokens=300, num_keys=64, num_values=64, groups=4, strength=0.1)
    inputs = inputs.to(torch.bfloat16)
    tensors = {name: x.cuda() for name, x in inputs.tensors.items()}
    contiguous = {name: x.clone() for name, x in tensors.items()}
    fused_TBHP = torch.cat([tensors[name] for name in "qkv"], -1).transpose(0, 1).contiguous()
    tensors.update(zip("qkv", (x.transpose(0, 1) for x in fused_TBHP.split(64, -1)), strict=True))

    def step(tensors):
        leaves = Inputs(inputs.op, tensors).differentiable()
        o, state = leaves.run(kernels)
        y = o.float().square().sum() + state.square().sum()
        return o, state, *torch.autograd.grad(y, list(leaves.tensors.values()))

    eager, again, copied = step(tensors), step(tensors), step(contiguous)
    for x, *others in zip(eager, again, copied, captured(lambda: step(tensors)), strict=True):
        assert all(torch.equal(x, y) for y in others)


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_fused_delta_never_waits_for_the_device(decay, fused):
    inputs = make("delta_rule", decay, num_tokens=210, cu_seqlens=PACKED).to(torch.float32)
    inputs = on_gpu(inputs).differentiable()
    sum(x.sum() for x in inputs.run(kernels)).backward()  # compiles
    with never_waiting():
        sum(x.sum() for x in inputs.run(kernels)).backward()

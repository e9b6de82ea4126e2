"""The same kernels on a CUDA device: against the token loop in float64 on the CPU, forward and every gradient."""

import pytest
import torch
from gpu_checks import (
    DIMS,
    LAYOUTS,
    RMS,
    captured,
    check_errors,
    check_fused,
    fused_errors,
    never_waiting,
    on_gpu,
)
from scan_cases import OPS, PACKED, make, poison_empty

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


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.setenv("LINEAR_MOE_KERNELS", "triton")
    poison_empty(monkeypatch)


@pytest.mark.parametrize("dtype", RMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("decay", ["none", "head", "scalar"])
def test_fused_layouts(decay, layout, dtype, fused):
    check_fused(make("diag_decay", decay, num_keys=64, num_values=48, strength=0.1, **LAYOUTS[layout]), dtype)


@pytest.mark.parametrize("dtype", RMS)
@pytest.mark.parametrize(("num_keys", "num_values"), DIMS)
def test_fused_dims_and_groups(num_keys, num_values, dtype, fused):
    sizes = dict(num_keys=num_keys, num_values=num_values, num_heads=4, groups=2, num_tokens=130)
    for decay in ("none", "scalar"):
        check_fused(make("diag_decay", decay, strength=0.3, **sizes), dtype)


@pytest.mark.parametrize("dtype", RMS)
@pytest.mark.parametrize("decay", ["head", "scalar"])
@pytest.mark.parametrize("value", [0.0, -1e-3, -30.0, float("-inf")])
def test_fused_adversarial_decays(value, decay, dtype, fused):
    inputs = make(
        "diag_decay", decay, num_tokens=600, batch=1, groups=1, num_heads=2, num_keys=64, num_values=64
    )
    inputs.tensors["log_decay"].fill_(value)
    errors = fused_errors(inputs, dtype)
    if dtype == torch.float16 and value == -30.0:  # it holds no number as small as e^-30 and its products
        errors = {n: e for n, e in errors.items() if n not in ("grad log_decay", "grad state")}
    check_errors(inputs, errors, dtype)
    if decay == "scalar":
        inputs.tensors["log_decay"].fill_(-0.01)[:, 10:60:2] = -30.0
        inputs.tensors["log_decay"][:, 70:90] = -200.0
        check_fused(inputs, dtype)


KINDS = {"vector": ("vector", ""), "bonus": ("vector", "bonus"), "values": ("none", "log_decay_v")}


@pytest.mark.parametrize("dtype", RMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_fused_vector_layouts(kind, layout, dtype, fused):
    decay, extra = KINDS[kind]
    sizes = dict(num_keys=64, num_values=48, strength=0.1, **LAYOUTS[layout])
    check_fused(make("diag_decay", decay, extra=extra, **sizes), dtype)


@pytest.mark.parametrize("dtype", RMS)
@pytest.mark.parametrize(("num_keys", "num_values"), DIMS)
@pytest.mark.parametrize("kind", KINDS)
def test_fused_vector_dims_and_groups(kind, num_keys, num_values, dtype, fused):
    decay, extra = KINDS[kind]
    sizes = dict(num_keys=num_keys, num_values=num_values, num_heads=4, groups=2, num_tokens=130)
    check_fused(make("diag_decay", decay, extra=extra, strength=0.3, **sizes), dtype)


@pytest.mark.parametrize("dtype", RMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, -1e-3, -30.0, float("-inf"), "uneven"])
def test_fused_vector_adversarial_decays(value, kind, dtype, fused):
    """float16 holds no number as small as e^-30 and its products: gradients of such decays are 0 there."""
    decay, extra = KINDS[kind]
    sizes = dict(num_tokens=600, batch=1, groups=1, num_heads=2, num_keys=64, num_values=64)
    inputs = make("diag_decay", decay, extra=extra, strength=0.01, **sizes)
    name = "log_decay_v" if kind == "values" else "log_decay"
    if value == "uneven":
        inputs.tensors[name][:, 10:60:2, :, ::3] = -30.0
        inputs.tensors[name][:, 70:90, :, 1::3] = -200.0
        inputs.tensors[name][:, 100:500:37, :, 2::3] = float("-inf")
    else:
        inputs.tensors[name].fill_(value)
    errors = fused_errors(inputs, dtype)
    if dtype == torch.float16 and value == -30.0:
        errors = {n: e for n, e in errors.items() if n not in (f"grad {name}", "grad state")}
    check_errors(inputs, errors, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_vector_same_bits_and_in_a_graph(kind, fused):
    decay, extra = KINDS[kind]
    sizes = dict(num_tokens=300, num_keys=64, num_values=64, strength=0.1)
    inputs = make("diag_decay", decay, extra=extra, **sizes).to(torch.bfloat16)
    inputs = on_gpu(inputs).differentiable()

    def step():
        o, state = inputs.run(kernels)
        y = o.float().square().sum() + state.square().sum()
        # detached: what ends the graph of a run outside of a capture must not end that of a captured one
        return o.detach(), state.detach(), *torch.autograd.grad(y, list(inputs.tensors.values()))

    eager, again = step(), step()
    for x, y, z in zip(eager, again, captured(step), strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_strided_deterministic_and_in_a_graph(dtype, fused):
    """Slices of one projection in [T, B, ...] order; the same bits from every run, captured in a CUDA graph or not."""
    torch.manual_seed(0)
    fused_TBHP = torch.randn(300, 2, 4, 3 * 64, device="cuda", dtype=dtype)
    log_decay = -torch.rand(2, 300, 4, device="cuda") * 0.1
    q, k, v = (x.transpose(0, 1).requires_grad_() for x in fused_TBHP.split(64, -1))

    def step():
        o, state = kernels.diag_decay(q, k, v, log_decay, scale=0.125)
        grads = torch.autograd.grad(o.float().square().sum() + state.square().sum(), (q, k, v))
        return o.detach(), state.detach(), *grads

    eager, again = step(), step()
    with torch.no_grad():
        contiguous = kernels.diag_decay(*(x.contiguous() for x in (q, k, v)), log_decay, scale=0.125)
    for x, y, z in zip(eager, again, captured(step)):
        assert torch.equal(x, y) and torch.equal(x, z)
    assert torch.equal(eager[0], contiguous[0]) and torch.equal(eager[1], contiguous[1])


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_fused_never_waits_for_the_device(decay, fused):
    inputs = make("diag_decay", decay, num_tokens=210, cu_seqlens=PACKED).to(torch.float32)
    inputs = on_gpu(inputs).differentiable()
    sum(x.sum() for x in inputs.run(kernels)).backward()  # compiles
    with never_waiting():
        sum(x.sum() for x in inputs.run(kernels)).backward()

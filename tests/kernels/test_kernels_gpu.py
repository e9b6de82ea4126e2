"""The same kernels on a CUDA device: against the token loop in float64 on the CPU, forward and every gradient."""

import pytest
import torch
from scan_cases import OPS, PACKED, Inputs, make, poison_empty, results
from triton_segment_cases import DELTA, DIAG, comparable
from triton_segment_cases import results as segment_results

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


RMS = {torch.float32: (1e-5, 1e-5), torch.float16: (1e-3, 1e-3), torch.bfloat16: (3e-3, 5e-3)}
"""Of outputs and states, and of gradients."""
OF_SCALED_OUTPUTS = 4e-3
"""bfloat16's, where single elements decay: q and k are rounded once more. docs/kernels.md has more of it."""
LAYOUTS = {
    "rows": dict(batch=40, num_heads=8, groups=8, num_tokens=70),
    "segments": dict(batch=1, num_tokens=1100),
    "packed": dict(num_tokens=230, cu_seqlens=PACKED),
}
DIMS = [(128, 128), (64, 64), (128, 256), (256, 128), (100, 48), (9, 3)]


def fused_errors(inputs: Inputs, dtype: torch.dtype) -> dict[str, float]:
    """Relative RMS errors of backend ``triton`` on the GPU against the token loop in float64 on equal values."""
    inputs = inputs.to(dtype)
    for name in {"log_decay", "log_decay_v", "bonus"} & inputs.tensors.keys():
        inputs.tensors[name] = inputs.tensors[name].float()
    on_gpu = Inputs(inputs.op, {name: x.cuda() for name, x in inputs.tensors.items()}, inputs.scale)
    found = results(on_gpu, kernels, dtype)
    truth = results(inputs.to(torch.float64), reference, dtype)
    difference = {name: (found[name].cpu().double() - x.double()).norm() for name, x in truth.items()}
    return {name: (difference[name] / x.double().norm().clamp(min=1e-30)).item() for name, x in truth.items()}


def check_errors(inputs: Inputs, errors: dict[str, float], dtype: torch.dtype) -> None:
    of_outputs, of_gradients = RMS[dtype]
    log_decay = inputs.tensors.get("log_decay_v", inputs.tensors.get("log_decay"))
    if dtype == torch.bfloat16 and log_decay is not None and log_decay.ndim == 4:
        of_outputs = OF_SCALED_OUTPUTS
    assert all(e <= (of_gradients if n.startswith("grad") else of_outputs) for n, e in errors.items()), errors


def check_fused(inputs: Inputs, dtype: torch.dtype) -> None:
    errors = fused_errors(inputs, dtype)
    check_errors(inputs, errors, dtype)


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
    check_fused(inputs, dtype)
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
    inputs = Inputs(inputs.op, {name: x.cuda() for name, x in inputs.tensors.items()}).differentiable()

    def step():
        o, state = inputs.run(kernels)
        y = o.float().square().sum() + state.square().sum()
        return o, state, *torch.autograd.grad(y, list(inputs.tensors.values()))

    eager, again = step(), step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for x, y, z in zip(eager, again, captured, strict=True):
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
        return o, state, *torch.autograd.grad(o.float().square().sum() + state.square().sum(), (q, k, v))

    eager, again = step(), step()
    contiguous = kernels.diag_decay(q.contiguous(), k.contiguous(), v.contiguous(), log_decay, scale=0.125)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for x, y, z in zip(eager, again, captured):
        assert torch.equal(x, y) and torch.equal(x, z)
    assert torch.equal(eager[0], contiguous[0]) and torch.equal(eager[1], contiguous[1])


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_fused_never_waits_for_the_device(decay, fused):
    inputs = make("diag_decay", decay, num_tokens=210, cu_seqlens=PACKED).to(torch.float32)
    inputs = Inputs(inputs.op, {name: x.cuda() for name, x in inputs.tensors.items()}).differentiable()
    sum(x.sum() for x in inputs.run(kernels)).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum(x.sum() for x in inputs.run(kernels)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


DELTA_DECAYS = ["none", "head", "scalar", "vector"]


@pytest.mark.parametrize("dtype", RMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("decay", DELTA_DECAYS)
def test_fused_delta_layouts(decay, layout, dtype, fused):
    sizes = dict(num_keys=64, num_values=48, strength=0.1, **LAYOUTS[layout])
    check_fused(make("delta_rule", decay, **sizes), dtype)


@pytest.mark.parametrize("dtype", RMS)
@pytest.mark.parametrize(("num_keys", "num_values"), DIMS)
def test_fused_delta_dims_and_groups(num_keys, num_values, dtype, fused):
    sizes = dict(num_keys=num_keys, num_values=num_values, num_heads=4, groups=2, num_tokens=130)
    for decay in ("none", "scalar", "vector"):
        check_fused(make("delta_rule", decay, strength=0.3, **sizes), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_fused_delta_long(decay, dtype, fused):
    sizes = dict(num_keys=128, num_values=128, num_heads=1, groups=1, batch=1, num_tokens=4096)
    check_fused(make("delta_rule", decay, strength=0.02, **sizes), dtype)


def repeated_keys(tensors):
    tensors["k"][:] = tensors["k"][:, :1].clone()
    tensors["beta"].fill_(1.0)


DELTA_EXTREMES = {
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
@pytest.mark.parametrize("extreme", DELTA_EXTREMES)
def test_fused_delta_extremes(extreme, decay, dtype, fused):
    """float16 holds no number as small as e^-30 and its products: gradients of such decays are 0 there.

    Where every token erases all that the one before it wrote, chunks sum what cancels, each rounded: 8 times the error.
    """
    sizes = dict(num_tokens=330, batch=1, groups=1, num_heads=2, num_keys=64, num_values=64, strength=0.01)
    inputs = make("delta_rule", decay, **sizes)
    DELTA_EXTREMES[extreme](inputs.tensors)
    errors = fused_errors(inputs, dtype)
    if dtype == torch.float16 and extreme == "e^-30":
        errors = {n: e for n, e in errors.items() if n not in ("grad log_decay", "grad state")}
    more = 8 if extreme == "repeated keys" and dtype.itemsize == 2 else 1
    limits = {n: more * RMS[dtype][n.startswith("grad")] for n in errors}
    assert all(e <= limits[n] for n, e in errors.items()), errors


@pytest.mark.parametrize("decay", DELTA_DECAYS)
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
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(tensors)
    graph.replay()
    torch.cuda.synchronize()
    for x, *others in zip(eager, again, copied, captured, strict=True):
        assert all(torch.equal(x, y) for y in others)


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_fused_delta_never_waits_for_the_device(decay, fused):
    inputs = make("delta_rule", decay, num_tokens=210, cu_seqlens=PACKED).to(torch.float32)
    inputs = Inputs(inputs.op, {name: x.cuda() for name, x in inputs.tensors.items()}).differentiable()
    sum(x.sum() for x in inputs.run(kernels)).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum(x.sum() for x in inputs.run(kernels)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


SEGMENTS = {**DIAG, **DELTA}


def segment_inputs(kind: str, strength: float = 0.1, **sizes: int) -> Inputs:
    op, decay, extra = SEGMENTS[kind]
    return make(op, decay, extra=extra, strength=strength, **sizes)


def check_segment(inputs: Inputs, dtype: torch.dtype) -> None:
    """Relative RMS errors of segments and their gradients; what is left of a memory is measured against the identity.

    But for diagonal decays, gradients in half precision are a sum of two, by way of the memory and of its decay.
    """
    inputs = inputs.to(dtype)
    for name in {"log_decay", "log_decay_v"} & inputs.tensors.keys():
        inputs.tensors[name] = inputs.tensors[name].float()
    found = segment_results(Inputs(inputs.op, {n: x.cuda() for n, x in inputs.tensors.items()}), kernels)
    truth = segment_results(inputs.to(torch.float64), reference)
    errors = {}
    for name, x in truth.items():
        f, t = comparable(name, found[name].cpu().double()), comparable(name, x)
        errors[name] = ((f - t).norm() / t.norm().clamp(min=1e-30)).item()
    of_outputs, of_gradients = RMS[dtype]
    if dtype == torch.bfloat16 and inputs.op != "diag_decay":
        of_outputs, of_gradients = OF_SCALED_OUTPUTS, 8e-3
    assert all(e <= (of_gradients if n.startswith("grad") else of_outputs) for n, e in errors.items()), errors


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
    check_segment(segment_inputs(kind, **sizes), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["scalar", "vector", "values", "delta scalar", "delta vector"])
def test_fused_segment_long(kind, dtype, fused):
    sizes = dict(num_keys=128, num_values=128, num_heads=1, groups=1, batch=1, num_tokens=4096)
    check_segment(segment_inputs(kind, strength=0.002, **sizes), dtype)


@pytest.mark.parametrize("kind", ["scalar", "vector", "values", "delta scalar", "delta vector"])
def test_fused_segment_same_bits_in_a_graph_and_no_waiting(kind, fused):
    inputs = segment_inputs(kind, num_tokens=230, num_keys=64, num_values=64, cu_seqlens=PACKED).to(
        torch.bfloat16
    )
    inputs = Inputs(inputs.op, {name: x.cuda() for name, x in inputs.tensors.items()})

    def step():
        leaves = inputs.differentiable()
        segment = leaves.segment(kernels)
        found = [x for x in (segment.state, segment.log_decay, segment.decay) if x is not None]
        used = [x for name, x in leaves.tensors.items() if x.requires_grad and name not in ("q", "state")]
        return *found, *torch.autograd.grad(sum(x.square().sum() for x in found), used)

    eager = step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for x, y, z in zip(eager, again, captured, strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)

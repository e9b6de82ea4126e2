"""Fused convolution, norms, rotary positions, loss and rows on a CUDA device, against their definitions in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from scan_cases import poison_empty, without_tf32
from torch import Tensor

from linear_moe import kernels
from linear_moe.kernels import reference

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
"""Root mean square of the error over that of the truth."""

Call = Callable[[ModuleType, dict[str, Tensor]], list[Tensor]]


def short_conv(module: ModuleType, t: dict[str, Tensor]) -> list[Tensor]:
    x = t["x"].unflatten(-1, (4, 160))[..., :96]  # slices of a fused projection
    options = dict(activation="silu", cu_seqlens=t.get("cu_seqlens"))
    wide = t["x"].unflatten(-1, (4, 160))
    parts = module.conv_and_split(wide, t["taps"], widths=(16, 80, 60, 4), **options)
    return [*module.short_conv(x, t["taps"], **options), *parts]


def gated_norm(module: ModuleType, t: dict[str, Tensor]) -> list[Tensor]:
    x, gate = t["x"].unflatten(-1, (5, 128)), t["gate"].unflatten(-1, (5, 128))
    return [
        module.gated_rms_norm(x, t["weight"], gate),
        module.gated_rms_norm(x, eps=1e-6 / 128, scale=128**-0.5),
    ]


def rows(module: ModuleType, t: dict[str, Tensor]) -> list[Tensor]:
    x = t["x"].flatten(0, 1)
    spread = module.spread_rows(x, t["order"], t["place"])
    return [spread, module.collect_rows(spread * 1.5, t["order"], t["place"], t["share"])]


def cross_entropy(module: ModuleType, t: dict[str, Tensor]) -> list[Tensor]:
    logits = t["logits"].detach().clone()
    return [module.cross_entropy_(logits, t["labels"], t["factor"]), logits]


def unit(module: ModuleType, t: dict[str, Tensor]) -> list[Tensor]:
    return [module.weighted_swiglu(t["x"].flatten(0, 1), t["share"][:, 0])]


def skip_norm(module: ModuleType, t: dict[str, Tensor]) -> list[Tensor]:
    x, gate = t["x"].unflatten(-1, (5, 128)), t["gate"].unflatten(-1, (5, 128))
    weight = t["weight"].expand(5, 128)
    return [
        module.skip_gate_norm(x, gate, weight[0, :5], weight, gate * 0.5),
        module.skip_gate_norm(x, None, None, weight),
        module.scale_heads(x, gate[..., 3]),
    ]


def stream(module: ModuleType, t: dict[str, Tensor]) -> list[Tensor]:
    x = t["x"]
    y, passed = module.rms_norm(x, t["weight"].repeat(5))
    tall, _ = module.rms_norm(x.unflatten(-1, (5, 128)).flatten(1, 2)[..., :96], t["bias"][:96])
    return [y, passed + t["gate"], tall]


def rotary(module: ModuleType, t: dict[str, Tensor]) -> list[Tensor]:
    q, k = t["x"].unflatten(-1, (5, 128)).split([4, 1], dim=2)
    whole, part = t["angles"].detach(), t["angles"][..., :16].detach()
    return [*module.rotate_heads(q, k, whole, scale=1.1), *module.rotate_heads(q, k * 0.5, part)]


def log_decay(module: ModuleType, t: dict[str, Tensor]) -> list[Tensor]:
    x, bias = t["x"].unflatten(-1, (5, 128)), t["bias"].expand(5, 128)
    return [
        module.log_decay_of(x, bias[0, :5].exp(), bias),
        *(module.log_decay_of(x, form=form, scale=0.3) for form in ("log_sigmoid", "sigmoid", "exp")),
    ]


def bounded_decay(module: ModuleType, t: dict[str, Tensor]) -> list[Tensor]:
    x, bound = t["x"].unflatten(-1, (5, 128)), t["weight"].expand(5, 128)
    return [*module.bounded_decay_of(x, bound), *module.bounded_decay_of(x * 16, bound * -16)]


def rwkv(module: ModuleType, t: dict[str, Tensor]) -> list[Tensor]:
    x, other, weight = t["x"], t["gate"], t["weight"].expand(5, 128)
    of_channel, logits = weight.flatten().expand(2, 640), torch.stack([x, other * 0.5], 2)
    k, gate = x.unflatten(-1, (5, 128)), other.unflatten(-1, (5, 128))
    return [
        *module.lerp_tokens(x, other, of_channel),
        *module.lerp_tokens(x, other, of_channel, logits),
        *module.lerp_tokens(x, other, None, logits, activation="sigmoid"),
        *module.edit_keys(k, gate, weight, weight * 0.5),
        module.gated_group_norm(k, weight, weight, gate, gate, k, k * 0.5, weight, activation=None),
        module.gated_group_norm(k, weight, weight, gate),
    ]


CALLS: dict[str, Call] = {
    **{f.__name__: f for f in (short_conv, gated_norm, skip_norm, stream, log_decay, bounded_decay, rows)},
    **{f.__name__: f for f in (cross_entropy, unit, rotary, rwkv)},
}
WIDE = ("factor", "angles", "bias")
"""What stays float32 in bfloat16 runs."""


def make(packed: bool) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    batch, tokens, slots = (1, 600, 8) if packed else (2, 300, 8)
    place = torch.randperm(600 * slots, generator=draw)
    found = dict(
        x=normal(batch, tokens, 640),
        gate=normal(batch, tokens, 640),
        angles=normal(batch, tokens, 64) * 200,
        taps=normal(4, 96, 4),
        weight=normal(128),
        bias=normal(128),
        share=torch.rand(600, slots, generator=draw, dtype=torch.float64),
        order=place.argsort(),
        place=place.view(600, slots),
        logits=normal(50, 30011) * 4,
        labels=torch.randint(0, 30011, (50,), generator=draw),
        factor=torch.rand(50, generator=draw, dtype=torch.float64),
    )
    if packed:
        found["cu_seqlens"] = torch.tensor([0, 0, 3, 4, 300, 590])
    return found


def on(tensors: dict[str, Tensor], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    def move(name: str, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x.to(device)
        wide = name in WIDE and dtype == torch.bfloat16
        return x.detach().to(device, torch.float32 if wide else dtype).requires_grad_()

    return {name: move(name, x) for name, x in tensors.items()}


def run(call: Call, module: Any, tensors: dict[str, Tensor]) -> list[Tensor]:
    outputs = call(module, tensors)
    leaves = [x for x in tensors.values() if x.requires_grad]
    if not any(y.requires_grad for y in outputs):
        return outputs
    total = sum((y.double() * direction(y)).sum() for y in outputs)
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    # detached, or the leaves' ends of this graph, and their stream, would go on into a captured one
    return [*(y.detach() for y in outputs), *(g for g in grads if g is not None)]


def direction(y: Tensor) -> Tensor:
    """Any, but of no output: rounded, that would be another in every dtype."""
    return 0.3 + torch.arange(y.numel(), dtype=torch.float64, device=y.device).cos().view(y.shape)


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LINEAR_MOE_KERNELS", "triton")
    poison_empty(monkeypatch)
    with without_tf32():
        yield


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", CALLS)
def test_equals_the_definition(name: str, packed: bool, dtype: torch.dtype) -> None:
    given = {n: x.to(dtype).double() if x.is_floating_point() else x for n, x in make(packed).items()}
    truth = run(CALLS[name], reference, on(given, "cpu", torch.float64))
    found = run(CALLS[name], kernels, on(given, "cuda", dtype))
    for ours, true in zip(found, truth, strict=True):
        difference = (ours.cpu().double() - true).square().mean().sqrt()
        assert difference <= TOLERANCE[dtype] * true.square().mean().sqrt()


@pytest.mark.parametrize("name", CALLS)
def test_same_bits_in_every_run_and_in_a_graph(name: str) -> None:
    tensors = on(make(packed=True), "cuda", torch.bfloat16)
    first = run(CALLS[name], kernels, tensors)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run(CALLS[name], kernels, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.graph(graph):
        captured = run(CALLS[name], kernels, tensors)
    graph.replay()
    for one, two, three in zip(first, second, captured, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)

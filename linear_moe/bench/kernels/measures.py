"""How a call is measured: error against the definition, milliseconds, peak memory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linear_moe import kernels
from linear_moe.bench.kernels.calls import ALL_SHAPES, Family, Operator, Shape, inputs
from linear_moe.kernels import reference

H100_BANDWIDTH = 3.02e12
"""Bytes per second, measured; for floors where there is no device to ask."""
LIMITS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (3e-3, 5e-3)}
"""Allowed relative error of outputs and states, and of gradients."""
OF_SCALED_OUTPUTS = 4e-3
"""bfloat16's, where single elements decay: docs/kernels.md says why."""


def median(run: Callable[[], Any]) -> tuple[float, str]:
    """Milliseconds, and of what: replays of a CUDA graph, or launches where something waits for the host."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start), "once"
    import triton.testing

    run()
    torch.cuda.synchronize()
    try:
        # as many calls in a graph as fill that time, and ten replays; more wait for the host, which captures them
        return triton.testing.do_bench_cudagraph(run, rep=20, return_mode="median"), "graph"
    except Exception:  # it cannot be captured
        torch.cuda.synchronize()
        return triton.testing.do_bench(run, warmup=50, rep=200, return_mode="median"), "launches"


def bandwidth() -> float:
    """Bytes per second that the device reads and writes while it copies."""
    if not torch.cuda.is_available():
        return H100_BANDWIDTH
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    milliseconds, _ = median(lambda: target.copy_(source))
    return 2 * source.numel() / milliseconds * 1e3


def peak(run: Callable[[], Any], forward: Callable[[], Tensor]) -> float:
    """MiB of the second call of ``run`` above inputs, output and what it returns."""
    run()
    o = forward()
    output = o.numel() * o.element_size()
    del o
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = run()
    kept = output + sum(x.numel() * x.element_size() for x in returned if x is not None)
    return (torch.cuda.max_memory_allocated() - before - kept) / 2**20


def small(shape: Shape) -> Shape:
    """What a token loop can do."""
    return dataclasses.replace(shape, batch=min(shape.batch, 2), tokens=min(shape.tokens, 300), heads=2)


def different_when_small(shapes: list[str]) -> list[str]:
    """One name for each shape that is still another one when it is small."""
    return list({small(ALL_SHAPES[name]): name for name in reversed(shapes)}.values())[::-1]


def errors(family: Family, shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Relative RMS errors against the token loop in float64 on the same values, and which are over the limit."""
    named, scale = inputs(family, shape, dtype, device), shape.keys**-0.5
    exact = {name: x.double() if x.is_floating_point() else x for name, x in named.items()}
    found = _results(getattr(kernels, family.op), named, scale)
    truth = _results(getattr(reference, family.op), exact, scale)
    relative = {
        name: ((found[name].double() - x).norm() / x.norm().clamp(min=1e-30)).item()
        for name, x in truth.items()
    }
    of_outputs, of_gradients = LIMITS[dtype]
    if dtype == torch.bfloat16 and family.decay in ("vector", "values"):
        of_outputs = OF_SCALED_OUTPUTS
    # not e <= limit: NaN is over it
    over = [n for n, e in relative.items() if not e <= (of_gradients if n.startswith("grad") else of_outputs)]
    return {
        "status": "wrong" if over else "ok",
        "outputs": max(e for n, e in relative.items() if not n.startswith("grad")),
        "gradients": max(e for n, e in relative.items() if n.startswith("grad")),
        "over_limit": sorted(over),
        "errors": relative,
    }


def _results(operator: Operator, named: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Outputs, and gradients from fixed random ones of the outputs."""
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in named.items()}
    o, state = operator(**leaves, scale=scale)
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    generator = torch.Generator().manual_seed(1)
    up = [torch.randn(x.shape, generator=generator).to(torch.bfloat16).to(x) for x in (o, state)]
    grads = torch.autograd.grad([o, state], list(wanted.values()), up)
    return {"o": o.detach(), "state": state.detach(), **{f"grad {n}": g for n, g in zip(wanted, grads)}}

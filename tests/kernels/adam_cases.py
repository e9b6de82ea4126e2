"""Cases of Adam's step; run_interpreted.py runs the fused kernel in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from linear_moe.kernels import reference

USUAL = dict(lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, decoupled=True, factor=0.3)
CASES: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "Adam": dict(decoupled=False),
    "slow moments": dict(beta1=0.95, beta2=0.999, lr=3e-3),
    "not clipped, no decay": dict(factor=1.0, weight_decay=0.0),
    "large eps, no first moment": dict(eps=0.1, beta1=0.0),
    "no copy": dict(half=False),
    "one element": dict(shape=(1,)),
    "full blocks": dict(shape=(4, 16)),
    "slices": dict(place=3),
    "empty": dict(shape=(0,)),
}
BLOCK = 32
STEPS = 4


def make(name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[Tensor], dict[str, Any]]:
    """What is overwritten, the gradients of some steps, and the options."""
    case = dict(CASES[name])
    shape, place, has_half = case.pop("shape", (3, 35)), case.pop("place", 0), case.pop("half", True)
    generator = torch.Generator().manual_seed(len(name))

    def normal() -> Tensor:
        size = torch.Size(shape).numel()
        x = torch.randn(place + size, generator=generator, dtype=torch.float64).to(dtype)
        return x[place:].view(shape)

    written = {"param": normal(), "exp_avg": torch.zeros(shape, dtype=dtype)}
    written["exp_avg_sq"] = torch.zeros(shape, dtype=dtype)
    if has_half:
        written["half"] = normal().half()
    grads = [normal() * 10**n for n in (0, 1, -3, 0)]
    grads[1].view(-1)[::5] = 0.0
    return written, grads, USUAL | case


def run(adam_: Callable[..., None], name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a few steps leave behind."""
    written, grads, options = make(name, dtype)
    half = written.get("half")
    for number, grad in enumerate(grads, 1):
        before = grad.clone()
        moments = written["exp_avg"], written["exp_avg_sq"]
        adam_(written["param"], grad, *moments, half, step=torch.tensor(float(number)), **options)
        assert torch.equal(grad, before)
    return written


def errors(name: str, adam_: Callable[..., None], dtype: torch.dtype) -> list[float]:
    """Largest error of each result over its largest element, after as many steps in float64; the copy is exact."""
    found = run(adam_, name, dtype)
    expected = run(reference.adam_, name, torch.float64)
    if "half" in found:
        assert torch.equal(found.pop("half"), found["param"].half())
        del expected["half"]
    return [
        ((x.double() - expected[n]).abs().max() / expected[n].abs().max()).item() if x.numel() else 0.0
        for n, x in found.items()
    ]


def fused(name: str) -> list[float]:
    """With several blocks."""
    from linear_moe.kernels.triton import adam

    with mock.patch.object(adam, "BLOCK", BLOCK):
        return errors(name, adam.adam_, torch.float32)

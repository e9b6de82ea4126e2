"""Cases of gates with a lower bound; run_interpreted.py runs the fused kernel in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from scan_cases import error, gradients
from torch import Tensor

from linear_moe.kernels import reference

Run = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

CASES: dict[str, dict[str, Any]] = {
    "two rows": dict(),
    "a slice of what lies time first": dict(strided=True),
    "20 channels": dict(shape=(1, 37, 3, 20)),
    "200 channels": dict(shape=(1, 5, 2, 200), strided=True),
    "no bound": dict(bound=-torch.inf),
    "logits far out": dict(far=25.0),
    "float16": dict(dtype=torch.float16),
}

EDGES = (-100.0, -89.0, -30.0, -12.0, -3.0, -0.7, 0.0, 0.1, 1.0, 7.0, 16.0, 40.0, 89.0, 100.0)
"""Logits; of bounds too, with -inf."""


def make(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Arguments of one call; some logits are far from zero, and some channels have no bound."""
    case = CASES[name]
    batch, tokens, heads, width = case.get("shape", (2, 21, 3, 16))
    generator = torch.Generator().manual_seed(len(name))
    x = torch.randn(tokens, batch, heads, 2 * width, generator=generator, dtype=torch.float64)
    x = x.to(dtype if dtype == torch.float64 else case.get("dtype", dtype)) * case.get("far", 1.0)
    x = x.transpose(0, 1)[..., width:]
    x[0, 0] *= 6
    x = x if case.get("strided", False) else x.contiguous()
    bound = 3 * torch.randn(heads, width, generator=generator, dtype=torch.float64).to(dtype)
    bound[0, ::3] = -torch.inf
    bound += case.get("bound", 0.0)
    return x.detach().requires_grad_(), bound.requires_grad_()


def errors(name: str, run: Run, dtype: torch.dtype) -> list[float]:
    """Of the results and the gradients, through both and through each alone, against the definition in float64."""
    given = make(name, dtype)
    exact = tuple(x.detach().double().requires_grad_() for x in given)
    return [error(f, t) for f, t in zip(_found(run, given), _found(reference.bounded_decay_of, exact))]


def _found(run: Run, given: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = dict(zip(("x", "bound"), given))
    found = []
    for picked in ([0, 1], [0], [1]):
        outputs = run(*given)
        found += gradients([outputs[n] for n in picked], leaves, torch.float16).values()
    return [*outputs, *found]


def of_little(run: Run, dtype: torch.dtype) -> list[float]:
    """Largest relative error of single results and gradients of logits, at all edges; long memories need them."""
    bounds = torch.tensor([-torch.inf, *EDGES], dtype=torch.float64)
    x = torch.tensor(EDGES, dtype=torch.float64).view(1, -1, 1, 1).expand(-1, -1, 1, len(bounds))
    found, exact = (
        _single(of, x.to(kind), bounds[None].to(kind))
        for of, kind in ((run, dtype), (reference.bounded_decay_of, torch.float64))
    )
    # below 1e-30 float32 has few digits, and at last none
    return [((f.double() - e).abs() / (e.abs() + 1e-30)).max().item() for f, e in zip(found, exact)]


def _single(run: Run, x: Tensor, bound: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    bound = bound.clone().requires_grad_()
    outputs = run(x, bound)
    grads = [torch.autograd.grad(y.sum(), (x, bound), retain_graph=True) for y in outputs]
    return [*outputs, *(grad for pair in grads for grad in pair)]


def fused(name: str) -> list[list[float]]:
    """With several runs of tokens, and several tiles in a run; then how it does far out."""
    from linear_moe.kernels.triton import bounded_decay

    with mock.patch.multiple(bounded_decay, RUN=16, TILE=1):
        found = errors(name, bounded_decay.bounded_decay_of, torch.float32)
    return [found, of_little(bounded_decay.bounded_decay_of, torch.float32)]

"""Cases of rows between tokens and slots; run_interpreted.py runs the fused kernels in Triton's interpreter."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from scan_cases import error, gradients
from torch import Tensor

from linear_moe.kernels import reference

CASES: dict[str, dict[str, Any]] = {
    "one slot": dict(tokens=5, slots=1, shape=(7,)),
    "three slots, heads": dict(tokens=6, slots=3, shape=(2, 9)),
    "slice of wider rows": dict(tokens=4, slots=2, shape=(12,), wide=True),
    "one number each": dict(tokens=5, slots=2, shape=()),
    "more channels than a block": dict(tokens=2, slots=2, shape=(1100,)),
    "places slot by slot in memory": dict(tokens=4, slots=3, shape=(7,), turned=True),
}


def make(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows of tokens and of slots, a permutation and its inverse, weights."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(len(name))

    def normal(*shape: int) -> Tensor:
        if not case.get("wide"):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        wider = torch.randn(*shape[:-1], 3 * shape[-1], generator=generator, dtype=torch.float64)
        return wider.to(dtype)[..., shape[-1] : 2 * shape[-1]]

    tokens, slots = case["tokens"], case["slots"]
    place = torch.randperm(tokens * slots, generator=generator)
    return dict(
        tokens=normal(tokens, *case["shape"]),
        slots=normal(tokens * slots, *case["shape"]),
        weight=torch.rand(tokens, slots, generator=generator, dtype=torch.float64).to(dtype),
        order=torch.argsort(place),
        place=place.view(tokens, slots).t().contiguous().t()
        if case.get("turned")
        else place.view(tokens, slots),
    )


def errors(name: str, module: ModuleType, dtype: torch.dtype) -> list[float]:
    """Of every result and gradient, against loops over rows in float64."""
    given = make(name, dtype)
    exact = {n: x.double() if x.is_floating_point() else x for n, x in given.items()}
    found, truth = _results(module, given), _results(reference, exact)
    return [error(f.double(), t) for f, t in zip(found, truth, strict=True)]


def _results(module: ModuleType, given: dict[str, Tensor]) -> list[Tensor]:
    leaves = {n: given[n].detach().requires_grad_() for n in ("tokens", "slots", "weight")}
    index = given["order"], given["place"]
    outputs = [
        module.spread_rows(leaves["tokens"], *index),
        module.collect_rows(leaves["slots"], *index, leaves["weight"]),
        module.collect_rows(leaves["slots"], *index),
    ]
    return [*outputs, *gradients(outputs, leaves).values()]


def fused(name: str) -> list[float]:
    from linear_moe.kernels.triton import rows

    return errors(name, rows, torch.float32)

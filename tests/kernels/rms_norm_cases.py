"""Cases of the norm of a residual stream; run_interpreted.py runs the fused kernel in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from scan_cases import errors_of
from torch import Tensor

from linear_moe.kernels import reference

CASES: dict[str, dict[str, Any]] = {
    "several tiles for each program": dict(shape=(3, 90, 40)),
    "fewer tokens than a tile": dict(shape=(1, 3, 64)),
    "one token, one channel": dict(shape=(1, 1, 1)),
    "a token fills several tiles": dict(shape=(1, 5, 4100)),
    "time first, slices": dict(shape=(2, 21, 24), strided=True),
    "nothing passed on": dict(shape=(1, 40, 48), used="y"),
    "passed on alone": dict(shape=(1, 4, 8), used="passed"),
    "an expanded gradient": dict(shape=(2, 5, 20), used="sum"),
    "without eps": dict(shape=(1, 3, 64), eps=0.0),
}


def make(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of one call; one token is nearly zero, where eps matters."""
    case = CASES[name]
    batch, tokens, width = case["shape"]
    draw = torch.Generator().manual_seed(len(name))
    wide = torch.randn(tokens, batch, 2 * width, generator=draw, dtype=torch.float64).to(dtype)
    x = wide.transpose(0, 1)[..., 1 : 1 + width] if "strided" in case else wide[..., :width].transpose(0, 1)
    x = x if "strided" in case else x.contiguous()
    x[0, 0] *= 1e-4
    weight = torch.randn(width, generator=draw, dtype=torch.float64).to(dtype)
    return {"x": x.detach().requires_grad_(), "weight": weight.requires_grad_()}


def errors(name: str, run: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> list[float]:
    """Of the output and the gradients, against the definition in float64."""

    def used(run: Callable[..., tuple[Tensor, Tensor]], **given: Tensor) -> Tensor:
        y, passed = run(**given, eps=CASES[name].get("eps", 1e-6))
        way = CASES[name].get("used", "both")
        if way == "sum":
            return y.sum() + passed.sum()
        if way == "passed":
            return passed * (0 * given["weight"] + 1)
        return y if way == "y" else y + 0.7 * passed.sin()

    return errors_of(lambda **t: used(run, **t), lambda **t: used(reference.rms_norm, **t), make(name, dtype))


def fused(name: str) -> list[float]:
    """By four programs, with tiles of two tokens or more."""
    from linear_moe.kernels.triton import rms_norm

    with mock.patch.multiple(rms_norm, PER_PROCESSOR=1, ELEMENTS=128):
        return errors(name, rms_norm.rms_norm, torch.float32)

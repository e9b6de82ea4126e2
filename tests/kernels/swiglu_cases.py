"""Cases of the weighted gated unit; run as a program, the fused kernel's errors in Triton's interpreter as JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from scan_cases import error, gradients, poison_empty
from torch import Tensor

from linear_moe.kernels import reference

CASES = {"one block": (5, 16, False), "several blocks": (3, 100, False), "slice": (4, 9, True)}
"""Rows, width, and whether rows are slices of wider ones."""


def make(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    rows, width, is_slice = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    x = torch.randn(rows, 2 * width + 5, generator=generator, dtype=torch.float64).to(dtype) * 3
    x = x[:, 2 : 2 + 2 * width]
    weight = torch.rand(rows, generator=generator, dtype=torch.float64).to(dtype)
    x = x if is_slice else x.contiguous()
    return {n: t.detach().requires_grad_() for n, t in (("x", x), ("weight", weight))}


def errors(name: str, run: Callable[..., Tensor], dtype: torch.dtype) -> list[float]:
    """Of the output and both gradients, against one row after the other in float64."""
    given = make(name, dtype)
    exact = {n: t.detach().double().requires_grad_() for n, t in given.items()}
    found, truth = (
        [y, *gradients([y], leaves).values()]
        for y, leaves in ((run(**given), given), (reference.weighted_swiglu(**exact), exact))
    )
    return [error(f.double(), t) for f, t in zip(found, truth, strict=True)]


def main() -> None:
    import pytest

    from linear_moe.kernels.triton import swiglu

    with pytest.MonkeyPatch.context() as patch, mock.patch.object(swiglu, "_block", lambda width: 32):
        poison_empty(patch)
        print(json.dumps({name: errors(name, swiglu.weighted_swiglu, torch.float32) for name in CASES}))


if __name__ == "__main__":
    main()

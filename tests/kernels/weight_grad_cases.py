"""Cases of experts' weight gradients; run_interpreted.py runs the fused kernel in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from linear_moe.kernels import reference

CASES: dict[str, tuple[list[int], int, int]] = {
    "even": ([8, 16, 24], 16, 32),
    "some without tokens": ([0, 5, 5, 40, 40], 24, 40),
    "none with tokens": ([0, 0], 16, 8),
    "rows of nobody": ([3, 30, 31], 40, 24),
    "one expert": ([37], 8, 72),
}
"""Ends of experts, outputs and inputs. There are 40 tokens."""
TOKENS = 40
TILES = {"tiles": dict(BO=16, BI=32, BM=16), "one tile": dict(BO=64, BI=128, BM=64)}


def make(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of large numbers: nothing may be left of a sum that is overwritten."""
    ends, num_outputs, num_inputs = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    total = 100 * normal(len(ends), num_outputs, num_inputs)
    given = {"total": total.to(torch.promote_types(dtype, torch.float32))}
    given |= {"dy": normal(TOKENS, num_outputs).to(dtype), "x": normal(TOKENS, num_inputs).to(dtype)}
    return given | {"ends": torch.tensor(ends, dtype=torch.int32)}


def errors(name: str, run: Callable[..., None], dtype: torch.dtype) -> list[float]:
    """Largest error written and added, over the largest element, against one token after the other in float64.

    A row of NaN behind the last end, and in the sum where it is overwritten, is nobody's.
    """
    found = []
    for add in (False, True):
        given = make(name, dtype)
        exact = {n: x.double() if x.is_floating_point() else x for n, x in given.items()}
        reference.grouped_weight_grad_(**exact, add=add)
        for x in (given["dy"], given["x"]):
            x[CASES[name][0][-1] :] = float("nan")
        if not add:
            given["total"].fill_(float("nan"))
        run(**given, add=add)
        truth = exact["total"]
        found.append(((given["total"] - truth).abs().max() / truth.abs().max().clamp(min=1)).item())
    return found


def fused(name: str) -> list[float]:
    """With one tile and with several, of which the last ones are parts."""
    from linear_moe.kernels.triton import weight_grad

    found = []
    for tile in TILES.values():
        with mock.patch.object(weight_grad, "launch_options", lambda *sizes, tile=tile: tile):
            found += errors(name, weight_grad.grouped_weight_grad_, torch.float16)
    return found

"""Cases of rotary positions; run_interpreted.py runs the fused kernel in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from scan_cases import error, gradients
from torch import Tensor

from linear_moe.kernels import reference

CASES: dict[str, dict[str, Any]] = {
    "whole heads": dict(shape=(2, 21, 3, 3, 32), angles=16),
    "more heads than a program takes": dict(shape=(1, 9, 5, 2, 12), angles=6, scale=1.3),
    "a part of each head": dict(shape=(2, 7, 2, 1, 44), angles=5, scale=0.8),
    "rows at places of their own": dict(shape=(3, 1, 2, 2, 16), angles=8, own=True),
    "a million tokens further": dict(shape=(1, 18, 2, 1, 24), angles=9, first=1_000_000),
    "a billion, in float64": dict(shape=(1, 6, 2, 1, 16), angles=8, first=10**9, exact=True),
    "dense": dict(shape=(2, 5, 4, 2, 16), angles=4, dense=True),
}
"""Rows, tokens, heads of queries and of keys, and their width; angles of a token."""


def make(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Queries and keys as slices of one projection, time first."""
    case = CASES[name]
    (batch, tokens, heads, groups, width), num_angles = case["shape"], case["angles"]
    generator = torch.Generator().manual_seed(len(name))
    fused = torch.randn(tokens, batch, heads + 2 * groups, width, generator=generator, dtype=torch.float64)
    q, k, _ = fused.to(dtype).transpose(0, 1).split([heads, groups, groups], dim=2)
    if case.get("dense"):
        q, k = q.contiguous(), k.contiguous()
    places = torch.arange(tokens) + case.get("first", 0)
    if case.get("own"):
        places = places + torch.tensor([[3], [0], [70]])
    slower = 10_000.0 ** (-torch.arange(num_angles) / num_angles)
    angles = (places.unsqueeze(-1) * slower.double()).expand(batch, tokens, num_angles)
    angles = angles if case.get("exact") else angles.float()
    given = dict(q=q.detach().requires_grad_(), k=k.detach().requires_grad_(), angles=angles)
    return given | ({"scale": case["scale"]} if "scale" in case else {})


def errors(name: str, run: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> list[float]:
    """Of both outputs and both gradients, against the definition in float64."""
    given = make(name, dtype)
    exact = given | {n: given[n].detach().double().requires_grad_() for n in ("q", "k")}
    exact["angles"] = given["angles"].double()
    found, truth = (
        [*y, *gradients(list(y), {n: arguments[n] for n in ("q", "k")}).values()]
        for y, arguments in ((run(**given), given), (reference.rotate_heads(**exact), exact))
    )
    return [error(x, y) for x, y in zip(found, truth, strict=True)]


def fused(name: str) -> list[float]:
    """With several tiles of tokens and blocks of heads; and 1 if results lie in another order than what was turned."""
    from linear_moe.kernels.triton import rotary

    with mock.patch.multiple(rotary, ELEMENTS=64, HEADS=2):
        given = make(name, torch.float32)
        is_moved = [rotary.rotate_heads(**given)[n].stride() != _order(given[x]) for n, x in enumerate("qk")]
        return [*errors(name, rotary.rotate_heads, torch.float32), float(any(is_moved))]


def _order(x_BTHK: Tensor) -> tuple[int, ...]:
    """Strides of a dense tensor whose tokens lie outside of rows where those of ``x`` do."""
    if x_BTHK.stride(0) >= x_BTHK.stride(1):
        return x_BTHK.contiguous().stride()
    return x_BTHK.transpose(0, 1).contiguous().transpose(0, 1).stride()

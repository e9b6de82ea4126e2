"""Cases of log decays from logits; run_interpreted.py runs the fused kernel in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from scan_cases import errors_of
from torch import Tensor

from linear_moe.kernels import reference

CASES: dict[str, dict[str, Any]] = {
    "softplus, rate and bias": dict(form="softplus", rate=True, bias=True, scale=1.5),
    "softplus, bias": dict(form="softplus", bias=True, shape=(1, 1, 2, 200)),
    "log of a sigmoid": dict(form="log_sigmoid", scale=1 / 16, shape=(1, 37, 3, 20)),
    "sigmoid": dict(form="sigmoid", scale=0.6, strided=True),
    "exponential, rate": dict(form="exp", rate=True, strided=True),
}


def make(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of one call; some logits are far from zero, where f or 1 - f is nearly nothing."""
    case = dict(CASES[name])
    batch, tokens, heads, width = case.pop("shape", (2, 21, 3, 16))
    generator = torch.Generator().manual_seed(len(name))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = normal(tokens, batch, heads, 2 * width).transpose(0, 1)[..., width:]  # time first, a slice
    x[0, 0] *= 6
    tensors = dict(x=x if case.pop("strided", False) else x.contiguous())
    if case.pop("rate", False):
        tensors["rate"] = normal(heads).abs()
    if case.pop("bias", False):
        tensors["bias"] = normal(heads, width)
    return {n: t.detach().requires_grad_() for n, t in tensors.items()} | case


def errors(name: str, run: Callable[..., Tensor], dtype: torch.dtype) -> list[float]:
    """Of the output and the gradients, against the definition in float64."""
    return errors_of(run, reference.log_decay_of, make(name, dtype))


def fused(name: str) -> list[float]:
    """With several runs of tokens, and several tiles in a run; then how it does where f is nearly nothing."""
    from linear_moe.kernels.triton import log_decay

    with mock.patch.multiple(log_decay, RUN=16, TILE=1):
        found = errors(name, log_decay.log_decay_of, torch.float32)
    return [*found, _of_little(log_decay.log_decay_of, name)]


def _of_little(run: Callable[..., Tensor], name: str) -> float:
    """Largest relative error of single results far out; long memories are made of such decays."""
    form = CASES[name]["form"]
    x = torch.linspace(-20, 20, 160, dtype=torch.float64).view(1, 10, 1, 16)
    exact = reference.log_decay_of(x, form=form)
    return ((run(x.float(), form=form) - exact) / exact).abs().max().item()

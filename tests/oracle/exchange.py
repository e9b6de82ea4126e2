"""One of our mixers with its projections as a plain function of named weights, and its comparison with another's layer.

Weights are not copied but exchanged by a differentiable function: ``weights(layer)`` gives ours as expressions of the
other layer's parameters. So both sides are functions of the same input and the same parameters, and every gradient can
be compared: of the input and of each parameter, by its name in the other's library.

Letters: B batch, T tokens, D hidden, H heads, W fused width per head, V value dim.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_moe import lsm
from linear_moe.lsm import Mixer, Placement

Weights = dict[str, Tensor]
"""Ours by name: projections ``[H * width, D]``, ``a.down``, ``a.up``, ``a.bias`` if of low rank, parameters, ``out``."""

BATCH, TOKENS = 2, 70
"""More than 64 tokens: below, fla's layers take another path."""


@dataclass(frozen=True)
class Case:
    """A layer of another library, and how ours becomes the same function.

    Attributes:
        mixer: registered name.
        build: makes the other layer.
        weights: ours in terms of its parameters.
        options: of our Config.
        run: calls the other layer.
        place: where our mixer stands.
        context: in which the other layer is built, run and differentiated.
        unused: parameters of the other layer that its forward pass does not use.
    """

    mixer: str
    build: Callable[[], nn.Module]
    weights: Callable[[Any], Weights]
    options: dict[str, Any]
    run: Callable[[Any, Tensor], Tensor] = lambda layer, x: layer(x)[0]
    place: Placement | None = None
    context: Callable[[], AbstractContextManager] = nullcontext
    unused: frozenset[str] = field(default_factory=frozenset)


def heads(x: Tensor, num_heads: int) -> Tensor:
    """``[H * width, ..]`` to ``[H, width, ..]``."""
    return x.unflatten(0, (num_heads, -1))


def layer(mixer: Mixer, weights: Weights, x_BTD: Tensor, place: Placement) -> Tensor:
    """Input projections, :meth:`Mixer.mix`, output projection."""
    cfg, weights = mixer.cfg, dict(weights)
    fused = [heads(weights.pop(p.name), cfg.num_heads) for p in mixer.fused_projections()]
    in_proj_WD = torch.cat(fused, dim=1).flatten(0, 1)
    x_BTHW = F.linear(x_BTD, in_proj_WD).unflatten(-1, (cfg.num_heads, -1))
    low_rank = {}
    for p in mixer.low_rank_projections():
        down, up = weights.pop(f"{p.name}.down"), weights.pop(f"{p.name}.up")
        projected = F.linear(F.linear(x_BTD, down), up, weights.pop(f"{p.name}.bias") if p.bias else None)
        low_rank[p.name] = projected.unflatten(-1, (cfg.num_heads, -1))
    out = weights.pop("out")
    assert weights.keys() == {table.name for table in mixer.all_parameters()}
    for table in mixer.all_parameters():
        assert weights[table.name].shape == table.shape, (table, weights[table.name].shape)
    o_BTHV, _ = mixer.mix(x_BTHW, low_rank, weights, place)
    return F.linear(o_BTHV.flatten(2), out)


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Every parameter away from where its initialisation hides mistakes (zeros, ones)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 4
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn * fan_in**-0.5 + (parameter.ndim == 1))


def both(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Output and gradients by name: ours, theirs."""
    with case.context():
        other = case.build().double()
    randomize(other)
    mixer = lsm.get(case.mixer)(lsm.get(case.mixer).Config(**case.options))
    place = case.place or Placement(num_heads=mixer.cfg.num_heads)
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH, TOKENS, mixer.cfg.hidden_size)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    leaves = {"x": x} | {name: p for name, p in other.named_parameters() if name not in case.unused}

    with case.context():
        theirs = case.run(other, x)
        their_gradients = torch.autograd.grad(theirs, list(leaves.values()), drawn)
    ours = layer(mixer, case.weights(other), x, place)
    our_gradients = torch.autograd.grad(ours, list(leaves.values()), drawn)
    return (
        {"output": ours} | {f"grad {name}": grad for name, grad in zip(leaves, our_gradients, strict=True)},
        {"output": theirs}
        | {f"grad {name}": grad for name, grad in zip(leaves, their_gradients, strict=True)},
    )


def check(case: Case, tolerance: float = 1e-10) -> None:
    """Same output, same gradient of the input and of every parameter of theirs, relative to the largest value."""
    ours, theirs = both(case)
    errors = {
        name: ((ours[name] - truth).abs().max() / truth.abs().max().clamp(min=1e-30)).item()
        for name, truth in theirs.items()
    }
    assert all(error <= tolerance for error in errors.values()), errors

"""One of our mixers with its projections as a plain function of named weights, and its comparison with another's layer.

Weights are not copied but exchanged by a differentiable function: ``weights(layer)`` gives ours as expressions of the
other layer's parameters. So both sides are functions of the same input and the same parameters, and every gradient can
be compared: of the input and of each parameter, by its name in the other's library.

Letters: B batch, T tokens, D hidden, H heads, W fused width per head, V value dim.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_moe import lsm
from linear_moe.lsm import Mixer, Placement, Projection

Weights = dict[str, Tensor]
"""Ours by name: projections ``[H * width, D]``, ``a.down``, ``a.up``, ``a.bias`` of low rank, parameters, ``out``."""

WAISTS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
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
        changes: attributes of our mixer's class that no option sets: what differs.
        run: calls the other layer with the input, and with the value of the first layer if ``has_first``.
        has_first: the layer is a later one whose first passes a value on.
        place: where our mixer stands.
        context: in which the other layer is built, run and differentiated.
        unused: parameters of the other layer that its forward pass does not use.
        training: mode of the other layer.
    """

    mixer: str
    build: Callable[[], nn.Module]
    weights: Callable[[Any], Weights]
    options: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)
    run: Callable[..., Tensor] = lambda layer, x: layer(x)[0]
    has_first: bool = False
    place: Placement | None = None
    context: Callable[[], AbstractContextManager] = nullcontext
    unused: frozenset[str] = frozenset()
    training: bool = True


def named(other: nn.Module, **names: str) -> Weights:
    """Ours = theirs."""
    return {ours: other.get_parameter(theirs) for ours, theirs in names.items()}


def heads(x: Tensor, num_heads: int) -> Tensor:
    """``[H * width, ..]`` to ``[H, width, ..]``."""
    return x.unflatten(0, (num_heads, -1))


def layer(
    mixer: Mixer, weights: Weights, x_BTD: Tensor, place: Placement, first_BTC: Tensor | None = None
) -> Tensor:
    """Input projections, :meth:`Mixer.mix`, output projection; ``first_BTC``: see ``Mixer.first_value``."""
    weights = dict(weights)
    parameters = {table.name: weights.pop(table.name) for table in mixer.all_parameters()}
    for table in mixer.all_parameters():
        assert parameters[table.name].shape == table.shape, (table, parameters[table.name].shape)
    inputs = defaultdict(lambda: x_BTD)
    if mixer.token_shift:
        before_BTD = F.pad(x_BTD, (0, 0, 1, -1))
        inputs |= mixer.inputs(x_BTD, before_BTD, parameters)

    def project(p: Projection, number: int) -> Tensor:
        projected = inputs[p.name]
        if p.rank is not None:
            projected = WAISTS[p.waist](F.linear(projected, weights.pop(f"{p.name}.down")))
            bias = weights.pop(f"{p.name}.bias") if p.bias else None
            projected = F.linear(projected, weights.pop(f"{p.name}.up"), bias)
        else:
            projected = F.linear(projected, weights.pop(p.name))
        return projected.unflatten(-1, (number, p.width))

    num_heads = mixer.cfg.num_heads
    x_BTHW = torch.cat([project(p, num_heads) for p in mixer.fused_projections()], dim=-1)
    others = {
        p.name: project(p, num_heads)
        for p in mixer.low_rank_projections()
        if first_BTC is not None or not p.after_first
    }
    if first_BTC is not None:
        others[f"first_{mixer.first_value}"] = first_BTC.unflatten(-1, (num_heads, -1))
    if mixer.grouped_projections():
        groups = [project(p, mixer.num_groups) for p in mixer.grouped_projections()]
        others["groups"] = torch.cat(groups, dim=-1)
    if mixer.uses_hidden:
        _, weight, index = mixer.route(x_BTD, parameters)
        others |= {"hidden": x_BTD, "memory_weight": weight, "memory_index": index}
    out = weights.pop("out")
    assert not weights, weights.keys()
    o_BTHV, _ = mixer.mix(x_BTHW, others, parameters, place)
    return F.linear(o_BTHV.flatten(2), out)


MEANS = {"A_log": -3.0, "w_proj.linear.lora.2.bias": -3.0, "w_lora.lora.2.bias": -4.0}
"""Of parameters by the end of their name; the memory should last longer than a few tokens. Other vectors: 1."""


def randomize(module: nn.Module) -> None:
    """Every parameter away from where its initialisation hides mistakes (zeros, ones)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 4
            mean = next((m for end, m in MEANS.items() if name.endswith(end)), float(parameter.ndim == 1))
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn * fan_in**-0.5 + mean)


def other_layer(case: Case, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The layer of the other library, with random weights."""
    other = case.build().to(dtype)
    randomize(other)
    return other.train(case.training)


def inputs(case: Case, other: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """What is differentiated, the input first, and a gradient of the output."""
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH, TOKENS, case.options["hidden_size"])
    dtype = next(other.parameters()).dtype
    x, first, drawn = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)
    )
    sequences = {"x": x.requires_grad_()} | ({"first": first.requires_grad_()} if case.has_first else {})
    return sequences | {name: p for name, p in other.named_parameters() if name not in case.unused}, drawn


def differentiated(output: Tensor, leaves: dict[str, Tensor], drawn: Tensor) -> dict[str, Tensor]:
    """The output and its gradients by name."""
    output.backward(drawn)
    gradients = {f"grad {name}": leaf.grad for name, leaf in leaves.items()}
    without = [name for name, gradient in gradients.items() if gradient is None]
    assert not without, f"not used: {without}"
    return {"output": output.detach()} | gradients


def theirs(case: Case, dtype: torch.dtype = torch.float64, plain: bool = False) -> dict[str, Tensor]:
    """Output and gradients of the other layer; ``plain``: as the library runs it."""
    with nullcontext() if plain else case.context():
        other = other_layer(case, dtype)
        leaves, drawn = inputs(case, other)
        sequences = [leaves[name] for name in ("x", "first") if name in leaves]
        return differentiated(case.run(other, *sequences), leaves, drawn)


def ours(case: Case) -> dict[str, Tensor]:
    """Output and gradients of our layer with the other's weights, with respect to those."""
    with case.context():
        other = other_layer(case)
    leaves, drawn = inputs(case, other)
    kind = lsm.get(case.mixer)
    mixer = type(kind.__name__, (kind,), case.changes)(kind.Config(**case.options))
    place = case.place or Placement(num_heads=mixer.cfg.num_heads)
    output = layer(mixer, case.weights(other), leaves["x"], place, leaves.get("first"))
    return differentiated(output, leaves, drawn)


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference by name, relative to the largest true value; NaN counts as infinite."""
    assert found.keys() == truth.keys()
    return {
        name: ((found[name] - x).abs().max() / x.abs().max().clamp(min=1e-30)).nan_to_num(torch.inf).item()
        for name, x in truth.items()
    }


def check(case: Case, tolerance: float = 1e-10) -> None:
    """Same output, same gradient of the input and of every parameter of theirs."""
    found = errors(ours(case), theirs(case))
    assert all(error <= tolerance for error in found.values()), found

"""Random calls of every fused operator, and their judgement by the token loops of ``reference.py`` in float64.

A call is known by its number alone. Numbers that share ``number // PER_GEOMETRY`` share all that a kernel is compiled
for (operator, dtype, dims, heads, strides, packed or not); tokens, documents, gates, upstream gradients and values are
each number's own. ``LINEAR_MOE_RANDOM_CALLS`` in the environment makes other calls of the same numbers.

Letters: B batch, T tokens, N documents, H heads, G query/key heads, K key dim, V value dim.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linear_moe.kernels import reference

SEED = os.environ.get("LINEAR_MOE_RANDOM_CALLS", "0")
PER_GEOMETRY = 10
LIMITS = {
    torch.float32: (1e-5, 1e-5),
    torch.float16: (1e-3, 1e-3),
    torch.bfloat16: (3e-3, 5e-3),
}
"""Relative RMS error of outputs and states, and of gradients."""
OF_SCALED_OUTPUTS, OF_LOG_DECAYS, OF_BOTH = 4e-3, 1e-2, 7e-2
"""bfloat16's, of outputs where single elements decay, and of gradients of log decays: docs/kernels.md says why.

One of a head beside those of its columns is a sum over all tokens and columns of what cancels; an H100 had 4.2 %, the
interpreter 8 times 0.8 %.
"""
ROUNDINGS = 4
"""Or: as much as so many roundings of the inputs change the truth, where much of it cancels."""
SMALLEST = {torch.float32: 1e-37, torch.float16: 2**-16, torch.bfloat16: 2**-13}
"""Of the largest result of the call: what is less is what is left where halves cancelled, or below float16's 6e-8."""
LAYOUTS = ("dense", "dense", "time first", "slice", "slice, time first", "columns")
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """How large calls get."""

    tokens: int
    dim: int
    heads: int
    batch: int
    documents: int
    least_tokens: int = 1


FULL = Size(tokens=700, dim=256, heads=6, batch=3, documents=9)
"""On a device."""
LONG = Size(tokens=16384, dim=64, heads=1, batch=1, documents=3, least_tokens=16000)
SMALL = Size(tokens=70, dim=40, heads=2, batch=2, documents=4)
"""In the interpreter."""
STATES = 2**27
"""Numbers in the states of all tokens, which the truth keeps for its backward pass, several times."""


@dataclass
class Call:
    """One call, its tensors on the CPU in float64, rounded to what they are given as."""

    op: str
    dtype: torch.dtype
    words: list[str]
    """What is special about it."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    layouts: dict[str, str] = field(default_factory=dict)
    """Of tensors that are not dense."""
    wide: frozenset[str] = frozenset()
    """Tensors that are float32 whatever the dtype is."""
    narrow: frozenset[str] = frozenset()
    """Tensors that are float16."""
    constant: frozenset[str] = frozenset()
    """Tensors without a gradient."""
    upstream: str = "both"
    """Where gradients come from: all results, one of them, or the plain sum of all (an expanded 1)."""
    is_per_element: bool = False
    """Whether single elements decay."""
    is_bfloat16: bool = False
    """Whether its limits are bfloat16's, which has three bits less, in float16: for the interpreter."""
    slack: float = 1.0
    """Factor of the limits, in half precision."""
    run: Callable[[ModuleType | type, Call, dict[str, Tensor]], Outputs] = lambda module, call, given: {}

    def __str__(self) -> str:
        """For test ids."""
        return "-".join([self.op, str(self.dtype).removeprefix("torch."), *self.words]).replace(" ", "_")

    def dtype_of(self, name: str) -> torch.dtype:
        """What a tensor is given as."""
        return torch.float16 if name in self.narrow else torch.float32 if name in self.wide else self.dtype

    def arguments(self, device: str, exact: bool = False) -> dict[str, Tensor]:
        """New tensors every time, as they lie in memory, or dense and in float64."""
        found = {}
        for name, x in self.tensors.items():
            if not x.is_floating_point():
                found[name] = x.to(device)
                continue
            dtype = torch.float64 if exact else self.dtype_of(name)
            lying = x.to(device, dtype, copy=True)
            lying = lying if exact else lie(lying, self.layouts.get(name, "dense"))
            found[name] = lying.requires_grad_(name not in self.constant)
        return found


def lie(x: Tensor, layout: str) -> Tensor:
    """The same values in memory that is laid out otherwise; what is not of it is NaN."""
    if "time first" in layout and x.ndim > 2:
        return lie(x.transpose(0, 1).contiguous(), layout.replace("time first", "")).transpose(0, 1)
    if "slice" in layout:
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 11), float("nan"))
        return wide[..., 3 : 3 + x.shape[-1]].copy_(x)
    if "columns" in layout:
        return x.new_full((*x.shape, 2), float("nan"))[..., 0].copy_(x)
    return x


def results(module: ModuleType | type, call: Call, given: dict[str, Tensor], exact: bool = False) -> Outputs:
    """Outputs, and gradients from fixed random upstream ones, rounded to the dtype."""
    outputs = call.run(module, call, given)
    found = {name: y.detach() for name, y in outputs.items()}
    generator, ups = torch.Generator().manual_seed(1), {}
    for (
        name,
        y,
    ) in outputs.items():  # of those without a gradient, too, or the others would get something else
        drawn = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(call.dtype).to(y)
        ups[name] = torch.ones_like(y[:1, :1]).expand_as(y) if call.upstream == "sum" else drawn
    used = [name for name, y in outputs.items() if y.requires_grad and call.upstream in ("both", "sum", name)]
    leaves = {name: x for name, x in given.items() if x.requires_grad}
    if not used or not leaves:
        return found
    sources = [outputs[name] for name in used]
    grads = torch.autograd.grad(
        sources, list(leaves.values()), [ups[name] for name in used], allow_unused=True
    )
    for (name, x), grad in zip(leaves.items(), grads, strict=True):
        found[f"grad {name}"] = torch.zeros_like(x) if grad is None else grad
    return found


def judge(call: Call, module: ModuleType | type, device: str) -> dict[str, str]:
    """Every result that is too far from the truth, and how far; empty where all is well."""
    truth = results(reference, call, call.arguments(device, exact=True), exact=True)
    found = results(module, call, call.arguments(device))
    largest = max(rms(x) for x in truth.values())
    shaken: Outputs | None = None
    bad = {}
    for name, x in truth.items():
        if found[name].shape != x.shape:
            bad[name] = f"shape {list(found[name].shape)}, not {list(x.shape)}"
            continue
        error, limit = rms(found[name].double() - x), limit_of(call, name) * rms(x)
        dtype = call.dtype_of(name.removeprefix("grad "))
        if error <= max(limit, SMALLEST[min(dtype, call.dtype, key=lambda d: d.itemsize)] * largest):
            continue
        shaken = shaken or results(reference, shake(call), shake(call).arguments(device, exact=True), True)
        cancelling = ROUNDINGS * call.slack * rms(shaken[name] - x)
        if not error <= cancelling:
            bad[name] = f"{error / max(rms(x), 1e-300):.2e} (RMS {rms(x):.2e}; roundings: {cancelling:.2e})"
    return bad


def limit_of(call: Call, name: str) -> float:
    """Relative."""
    dtype = torch.bfloat16 if call.is_bfloat16 else call.dtype
    of_outputs, of_gradients = LIMITS[dtype]
    if name.removeprefix("grad ") in call.narrow:
        of_gradients = max(of_gradients, LIMITS[torch.float16][1])
    if dtype == torch.bfloat16 and call.is_per_element:
        of_outputs = OF_SCALED_OUTPUTS
    if dtype == torch.bfloat16 and "log_decay" in name:
        has_both = name == "grad log_decay" and "log_decay_v" in call.tensors
        of_gradients = OF_BOTH if has_both else OF_LOG_DECAYS
    slack = call.slack if dtype.itemsize == 2 else 1.0
    return slack * (of_gradients if name.startswith("grad") else of_outputs) / (8 if call.is_bfloat16 else 1)


def rms(x: Tensor) -> float:
    """Zero for none."""
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def shake(call: Call) -> Call:
    """The same call with every input off by up to a rounding."""
    generator, eps = torch.Generator().manual_seed(2), torch.finfo(call.dtype).eps

    def off(x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=generator, dtype=torch.float64) - 0.5
        return x * (1 + eps * noise)

    shaken = {name: off(x) if x.is_floating_point() else x for name, x in call.tensors.items()}
    return Call(**{**vars(call), "tensors": shaken})


@dataclass
class Dice:
    """Random choices of one call."""

    geometry: random.Random
    """What kernels are compiled for."""
    own: random.Random
    generator: torch.Generator

    @classmethod
    def of(cls, number: int) -> Dice:
        """Of its number."""
        own = random.Random(f"{SEED}/call/{number}")
        geometry = random.Random(f"{SEED}/geometry/{number // PER_GEOMETRY}")
        return cls(geometry, own, torch.Generator().manual_seed(own.getrandbits(60)))

    def normal(self, *shape: int) -> Tensor:
        """float64."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        """float64, in [0, 1)."""
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def tokens(self, size: Size, states: int = 1) -> int:
        """Often few, or at the border of a chunk; multiples of 16 or none, for which Triton compiles differently."""
        most = max(size.least_tokens, min(size.tokens, STATES // states))
        borders = [n + d for n in (16, 32, 64, 128, 256, 512) for d in (-1, 0, 1) if n + d <= most]
        few = self.own.randint(1, min(most, 40))
        chosen = self.own.choice([self.own.randint(1, most), self.own.randint(1, most), few])
        chosen = max(size.least_tokens, self.own.choice([*[chosen] * 3, self.own.choice(borders or [1])]))
        if self.geometry.random() < 0.3:
            return max(16, chosen // 16 * 16)
        return chosen + (chosen % 16 == 0)

    def dim(self, most: int) -> int:
        """Powers of two, multiples of 16, and others."""
        powers = [n for n in (16, 32, 64, 128, 256) if n <= most]
        choices = [self.geometry.choice(powers), self.geometry.randint(1, most)]
        return self.geometry.choice([*choices, max(16, self.geometry.randint(1, most) // 16 * 16)])

    def documents(self, num_tokens: int, most: int) -> list[int]:
        """Offsets: uneven documents, some of them empty; sometimes tokens are left after the last one."""
        end = num_tokens if self.own.random() < 0.7 else self.own.randint(0, num_tokens)
        cuts = [self.own.randint(0, end) for _ in range(self.own.randint(0, most - 1))]
        if cuts and self.own.random() < 0.4:
            cuts.append(self.own.choice([*cuts, 0, end]))
        return [0, *sorted(cuts), end]

    def layout(self) -> str:
        """Of one tensor."""
        return self.geometry.choice(LAYOUTS)

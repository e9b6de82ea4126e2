"""Inputs for the scan kernels, and their comparison with the token loops of ``reference.py``."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linear_moe.kernels import chunked_delta, chunked_diag, chunked_dplr, reference

# Not set by cu_seqlens alone: two empty documents at the start, one in the middle, two at the end, one of one token.
PACKED = (0, 0, 0, 1, 8, 8, 72, 137, 200, 200, 200)
DECAYS = ("none", "head", "scalar", "vector")
OPS = ("diag_decay", "delta_rule", "dplr_delta_rule")


class Chunked:
    """The chunked backend behind one name, as ``reference`` is."""

    diag_decay = staticmethod(chunked_diag.diag_decay)
    delta_rule = staticmethod(chunked_delta.delta_rule)
    diag_decay_segment = staticmethod(chunked_diag.diag_decay_segment)
    delta_rule_segment = staticmethod(chunked_delta.delta_rule_segment)
    dplr_delta_rule = staticmethod(chunked_dplr.dplr_delta_rule)
    dplr_delta_rule_segment = staticmethod(chunked_dplr.dplr_delta_rule_segment)


@dataclass
class Inputs:
    """Arguments of one call."""

    op: str
    tensors: dict[str, Tensor]
    scale: float = 0.7

    def run(self, module: ModuleType | type, **changes: Any) -> tuple[Tensor, Tensor]:
        return getattr(module, self.op)(**{**self.tensors, "scale": self.scale, **changes})

    def to(self, dtype: torch.dtype) -> Inputs:
        cast = {n: x.detach().to(dtype) if x.is_floating_point() else x for n, x in self.tensors.items()}
        return Inputs(self.op, cast, self.scale)

    def differentiable(self) -> Inputs:
        leaves = {n: x.detach().requires_grad_(x.is_floating_point()) for n, x in self.tensors.items()}
        return Inputs(self.op, leaves, self.scale)

    def segment(self, module: ModuleType | type) -> Any:
        names = ("k", "v", "beta", "a", "b", "log_decay", "log_decay_v", "cu_seqlens")
        return getattr(module, self.op + "_segment")(
            **{n: self.tensors[n] for n in names if n in self.tensors}
        )


def make(
    op: str = "diag_decay",
    decay: str = "none",
    *,
    batch: int = 2,
    num_tokens: int = 100,
    groups: int = 2,
    num_heads: int = 4,
    num_keys: int = 6,
    num_values: int = 5,
    extra: str = "",
    has_state: bool = True,
    cu_seqlens: tuple[int, ...] | None = None,
    strength: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """Random inputs; log decays are uniform in [-strength, 0]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if cu_seqlens is not None:
        batch = 1
    shape = batch, num_tokens, num_heads
    num_documents = batch if cu_seqlens is None else len(cu_seqlens) - 1
    tensors = {
        "q": normal(batch, num_tokens, groups, num_keys),
        "k": normal(batch, num_tokens, groups, num_keys),
        "v": normal(*shape, num_values),
    }
    decay_shape = {"head": (num_heads,), "scalar": shape, "vector": (*shape, num_keys)}
    if decay != "none":
        tensors["log_decay"] = -strength * uniform(*decay_shape[decay])
    if op == "delta_rule":
        tensors["k"] = torch.nn.functional.normalize(tensors["k"], dim=-1)
        tensors["beta"] = uniform(*shape)
    if op == "dplr_delta_rule":  # as in RWKV7
        removed = torch.nn.functional.normalize(normal(batch, num_tokens, groups, num_keys), dim=-1)
        tensors["a"] = -removed
        tensors["b"] = removed * uniform(batch, num_tokens, groups, num_keys)
    if extra == "log_decay_v":
        tensors["log_decay_v"] = -strength * uniform(*shape, num_values)
    if extra == "bonus":
        tensors["bonus"] = normal(num_heads, num_keys)
    if has_state:
        tensors["state"] = normal(num_documents, num_heads, num_keys, num_values)
    if cu_seqlens is not None:
        tensors["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32)
    return Inputs(op, tensors)


def error(found: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest true value. NaN counts as infinite."""
    assert found.shape == truth.shape, (found.shape, truth.shape)
    if truth.numel() == 0:
        return 0.0
    difference = (found.double() - truth.double()).abs().max() / truth.double().abs().max().clamp(min=1e-30)
    return math.inf if difference.isnan() else difference.item()


def check(inputs: Inputs, tolerance: float, *, dtype: torch.dtype = torch.float64) -> None:
    """Outputs, final state and every gradient, in ``dtype``, against the token loop in float64 on equal values."""
    given = inputs.to(dtype)
    truth = results(given.to(torch.float64), reference)
    found = results(given, Chunked)
    errors = {name: error(found[name], value) for name, value in truth.items()}
    assert all(e <= tolerance for e in errors.values()), errors


def results(
    inputs: Inputs, module: ModuleType | type, upstream: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Outputs and gradients, the latter from fixed random upstream gradients, rounded to ``upstream``."""
    inputs = inputs.differentiable()
    o, state = inputs.run(module)
    leaves = {n: x for n, x in inputs.tensors.items() if x.requires_grad}
    return {"o": o, "state_out": state, **gradients([o, state], leaves, upstream)}


def gradients(
    outputs: list[Tensor], leaves: dict[str, Tensor], upstream: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(upstream) for x in outputs]
    grads = [grad.to(x) for grad, x in zip(drawn, outputs)]  # dtype and device
    found = torch.autograd.grad(outputs, list(leaves.values()), grads)
    return {f"grad {name}": grad for name, grad in zip(leaves, found)}


def errors_of(
    run: Callable[..., Tensor], definition: Callable[..., Tensor], given: dict[str, Any]
) -> list[float]:
    """Of the output and the gradients of all tensors, against ``definition`` in float64 on equal values."""
    exact = {
        n: t.detach().double().requires_grad_() if isinstance(t, Tensor) else t for n, t in given.items()
    }
    found, truth = (
        [y, *gradients([y], {n: t for n, t in arguments.items() if isinstance(t, Tensor)}).values()]
        for y, arguments in ((run(**given), given), (definition(**exact), exact))
    )
    return [error(f.double(), t) for f, t in zip(found, truth, strict=True)]


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Products of float32 in float32; pytest's ``monkeypatch`` cannot take this flag back."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def poison_empty(monkeypatch: Any) -> None:
    """Make memory that is never written show up as NaN."""

    def poisoned(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            x = original(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return allocate

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))

"""What is called: families of operators, shapes, random inputs, and who answers the same call.

Letters: B batch, T tokens, H heads, K key dim, V value dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe import kernels

Operator = Callable[..., Any]
"""Takes the tensors of :func:`inputs` by name; returns the outputs first."""

OURS, PEER, TORCH = "ours", "fla", "torch"
"""Who answers a call."""
NAMES = {OURS: "linear_moe", PEER: "flash-linear-attention", TORCH: "softmax attention (PyTorch)"}


@dataclasses.dataclass(frozen=True)
class Family:
    """One way to call an operator."""

    op: str
    decay: str = ""
    """Nothing, head, scalar, vector, or values."""
    bonus: bool = False
    peer: str = ""
    """Of flash-linear-attention."""


FAMILIES = {
    "linear": Family("diag_decay", peer="simple_gla"),
    "retention": Family("diag_decay", "head", peer="simple_gla"),
    "mamba2": Family("diag_decay", "scalar", peer="simple_gla"),
    "gla": Family("diag_decay", "vector", peer="gla"),
    "rwkv6": Family("diag_decay", "vector", bonus=True, peer="rwkv6"),
    "gsa_keys": Family("diag_decay", "values"),
    "delta_net": Family("delta_rule", peer="delta_rule"),
    "gated_delta_net": Family("delta_rule", "scalar", peer="gated_delta_rule"),
    "kda": Family("delta_rule", "vector", peer="kda"),
    "rwkv7": Family("dplr_delta_rule", "vector", peer="dplr_delta_rule"),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of one call."""

    batch: int
    tokens: int
    heads: int
    keys: int
    values: int
    documents: int = 0
    """Packed, of uneven length."""

    def __str__(self) -> str:
        """For people."""
        packed = f", {self.documents} packed documents" if self.documents else ""
        return f"B {self.batch}, T {self.tokens}, H {self.heads}, K {self.keys}, V {self.values}{packed}"


SHAPES = {
    "2k": Shape(16, 2048, 8, 128, 128),
    "16k": Shape(2, 16384, 8, 128, 128),
    "64": Shape(16, 2048, 16, 64, 64),
    "wide": Shape(16, 2048, 8, 128, 256),
    "packed": Shape(1, 32768, 8, 128, 128, documents=23),
    "few_heads": Shape(1, 32768, 2, 128, 128),
}
SMOKE = {"tiny": Shape(2, 40, 2, 16, 16), "tiny_packed": Shape(1, 40, 2, 16, 16, documents=3)}
ALL_SHAPES = SHAPES | SMOKE


def inputs(
    family: Family, shape: Shape, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> dict[str, Tensor]:
    """Random; decays as mixers have them at initialisation."""
    generator = torch.Generator(device).manual_seed(seed)
    lead = shape.batch, shape.tokens, shape.heads

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, device=device).to(dtype)

    def decay(*size: int) -> Tensor:
        return F.logsigmoid(torch.randn(*size, generator=generator, device=device) + 2) / 16

    named = {"q": normal(*lead, shape.keys), "k": normal(*lead, shape.keys), "v": normal(*lead, shape.values)}
    sizes = {"head": lead[2:], "scalar": lead, "vector": (*lead, shape.keys)}
    if family.decay in sizes:
        named["log_decay"] = decay(*sizes[family.decay])
    if family.decay == "values":
        named["log_decay_v"] = decay(*lead, shape.values)
    if family.bonus:
        named["bonus"] = normal(shape.heads, shape.keys).float()
    if family.op != "diag_decay":
        named["k"] = F.normalize(named["k"].float(), dim=-1).to(dtype)
    if family.op == "delta_rule":
        named["beta"] = uniform(*lead)
    if family.op == "dplr_delta_rule":
        named["a"], named["b"] = -named["k"], named["k"] * uniform(*lead, 1)
    if shape.documents:
        named["cu_seqlens"] = _uneven(shape, seed).to(device)
    return named


def _uneven(shape: Shape, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randperm(shape.tokens - 1, generator=generator)[: shape.documents - 1] + 1
    return torch.tensor([0, *sorted(cuts.tolist()), shape.tokens], dtype=torch.int32)


def passes(run: Operator, named: dict[str, Tensor]) -> tuple[Callable[[], Tensor], Callable[[], Any]]:
    """The forward pass, and forward with backward, which returns the gradients."""
    is_leaf = {
        name: x.is_floating_point() and x.ndim > 1 for name, x in named.items()
    }  # a head's decay is fixed
    leaves = {name: x.detach().requires_grad_(is_leaf[name]) for name, x in named.items()}
    wanted = [x for x in leaves.values() if x.requires_grad]
    grad = torch.randn_like(run(**named)[0])

    def forward() -> Tensor:
        with torch.no_grad():
            return run(**named)[0]

    def both() -> Any:
        return torch.autograd.grad(run(**leaves)[0], wanted, grad, allow_unused=True)

    return forward, both


def ours(family: Family, shape: Shape) -> Operator:
    """The public operator."""
    operator, scale = getattr(kernels, family.op), shape.keys**-0.5
    return lambda **named: operator(**named, scale=scale)


def softmax(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    """torch's causal attention, on ``[B, H, T, D]``."""
    return (F.scaled_dot_product_attention(q, k, v, is_causal=True),)


def for_softmax(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """q, k and v in the order of dims that it is fastest with."""
    return {name: named[name].transpose(1, 2).contiguous() for name in "qkv"}


def least_bytes(family: Family, shape: Shape) -> tuple[float, float]:
    """To read every input and to write every output once: forward; with backward, where gradients are outputs, too."""
    few = dataclasses.replace(shape, batch=1, tokens=64, documents=0)
    tensors = inputs(family, few, torch.bfloat16, "cpu")
    per_token = sum(x.numel() * x.element_size() for x in tensors.values() if x.ndim > 2) / few.tokens
    num_tokens = shape.batch * shape.tokens
    given, out = num_tokens * per_token, 2 * num_tokens * shape.heads * shape.values
    return given + out, 3 * given + 2 * out

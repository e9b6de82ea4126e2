"""What benchmarks/kernels.py calls: families of operators, shapes, random inputs, and the same calls to peers."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe import kernels

BANDWIDTH = 3.02e12
"""Bytes per second, measured on an H100."""


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
    "rwkv7": Family("dplr_delta_rule", "vector"),
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


SHAPES = {
    "2k": Shape(16, 2048, 8, 128, 128),
    "16k": Shape(2, 16384, 8, 128, 128),
    "64": Shape(16, 2048, 16, 64, 64),
    "wide": Shape(16, 2048, 8, 128, 256),
    "packed": Shape(1, 32768, 8, 128, 128, documents=23),
    "few_heads": Shape(1, 32768, 2, 128, 128),
}
SMOKE = {"tiny": Shape(2, 40, 2, 16, 16), "tiny_packed": Shape(1, 40, 2, 16, 16, documents=3)}


def inputs(family: Family, shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Tensor]:
    """Random; decays as mixers have them at initialisation."""
    generator = torch.Generator(device).manual_seed(seed)
    lead = shape.batch, shape.tokens, shape.heads

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

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
        named["beta"] = torch.rand(*lead, generator=generator, device=device).to(dtype)
    if family.op == "dplr_delta_rule":
        named["a"] = -named["k"]
        named["b"] = named["k"] * torch.rand(*lead, 1, generator=generator, device=device).to(dtype)
    if shape.documents:
        cuts = torch.randperm(shape.tokens - 1, generator=torch.Generator().manual_seed(seed))[
            : shape.documents - 1
        ]
        bounds = [0, *sorted((cuts + 1).tolist()), shape.tokens]
        named["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
    return named


def calls(run: Callable[..., Any], named: dict[str, Tensor]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward, and forward with backward; ``run`` takes the named tensors."""
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in named.items()}
    wanted = [x for x in leaves.values() if x.requires_grad]
    grad = torch.randn_like(run(**named)[0])

    def forward() -> Any:
        with torch.no_grad():
            return run(**named)[0]

    def both() -> Any:
        return torch.autograd.grad(run(**leaves)[0], wanted, grad, allow_unused=True)

    return forward, both


def ours(family: Family, shape: Shape) -> Callable[..., Any]:
    """The public operator."""
    scale = shape.keys**-0.5
    return lambda **named: getattr(kernels, family.op)(**named, scale=scale)


def peer(family: Family, shape: Shape) -> Callable[..., Any]:
    """flash-linear-attention's operator with the same arguments; ``ImportError`` where there is none."""
    if not family.peer:
        raise ImportError("the peer has no such operator")
    if not torch.cuda.is_available():
        raise ImportError("the peer needs a GPU")
    module = importlib.import_module(f"fla.ops.{family.peer}")
    operator = getattr(module, f"chunk_{family.peer}")
    common = importlib.import_module("fla.ops.common.chunk_o")
    if family.decay == "scalar":  # refuses on this compiler; timed nevertheless, and the row says so
        common.TRITON_ABOVE_3_7_1 = True
    decay = {"rwkv6": "w", "simple_gla": "g_gamma" if family.decay == "head" else "g"}.get(family.peer, "g")
    names = {"log_decay": decay, "bonus": "u"} | ({"q": "r"} if family.peer == "rwkv6" else {})
    scale = shape.keys**-0.5

    def run(**named: Tensor) -> Any:
        if decay == "g_gamma":
            named["log_decay"] = named["log_decay"].detach()
        return operator(**{names.get(name, name): x for name, x in named.items()}, scale=scale)

    return run


def softmax(shape: Shape) -> Callable[..., Any]:
    """torch's causal attention, on tensors that lie as it likes them."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return (F.scaled_dot_product_attention(q, k, v, is_causal=True),)

    return run


def floor(family: Family, shape: Shape) -> tuple[float, float]:
    """Milliseconds to read every input and to write every output once; forward, and with backward."""
    tensors = inputs(
        family, dataclasses.replace(shape, batch=1, tokens=64, documents=0), torch.bfloat16, "cpu"
    )
    tokens = shape.batch * shape.tokens / 64
    given = tokens * sum(x.numel() * x.element_size() for name, x in tensors.items() if x.ndim > 2)
    out = 2 * shape.batch * shape.tokens * shape.heads * shape.values
    return 1e3 * (given + out) / BANDWIDTH, 1e3 * (3 * given + 2 * out) / BANDWIDTH


def results(operator: Callable[..., Any], named: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Outputs and gradients."""
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in named.items()}
    o, state = operator(**leaves, scale=scale)
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    generator = torch.Generator().manual_seed(1)
    up = [torch.randn(x.shape, generator=generator).to(torch.bfloat16).to(x) for x in (o, state)]
    grads = torch.autograd.grad([o, state], list(wanted.values()), up)
    return {"o": o.detach(), "state": state.detach(), **{f"grad {n}": g for n, g in zip(wanted, grads)}}

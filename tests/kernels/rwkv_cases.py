"""Cases of what stands around RWKV's recurrences; run_interpreted.py runs the fused kernels in Triton's interpreter."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from scan_cases import error, gradients
from torch import Tensor

from linear_moe.kernels import reference

MODULES = {"lerp_tokens": "lerp", "edit_keys": "edit_keys", "gated_group_norm": "group_norm"}
"""Of fused kernels."""
OWN = ("q", "k", "v", "bonus")

CASES: dict[str, dict[str, Any]] = {
    "six mixes": dict(op="lerp_tokens", mixes=6, without=("logits",)),
    "five mixes of each token": dict(op="lerp_tokens", mixes=5, strided=True),
    "a share by logits": dict(op="lerp_tokens", mixes=1, without=("weight",), activation="sigmoid"),
    "wide mixes": dict(op="lerp_tokens", mixes=2, shape=(1, 5, 1, 200), dtype=torch.float16),
    "keys": dict(op="edit_keys"),
    "keys, slices of what lies time first": dict(op="edit_keys", strided=True, shape=(2, 37, 3, 20)),
    "wide keys": dict(op="edit_keys", shape=(1, 5, 2, 200), dtype=torch.float16),
    "group norm, swish": dict(op="gated_group_norm", without=OWN),
    "group norm, sigmoid": dict(op="gated_group_norm", without=OWN, activation="sigmoid", strided=True),
    "group norm, its own, gate": dict(op="gated_group_norm", activation=None, strided=True),
    "group norm, its own": dict(op="gated_group_norm", without=("gate",), shape=(1, 37, 2, 48)),
    "wide group norm": dict(op="gated_group_norm", shape=(1, 5, 2, 200), dtype=torch.float16),
}


def make(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of one call; some keys are nearly nothing, where epsilon counts, and some logits far out."""
    case = dict(CASES[name])
    op, given = case["op"], case.get("dtype", dtype) if dtype != torch.float64 else dtype
    batch, tokens, heads, width = case.get("shape", (2, 21, 3, 16))
    generator = torch.Generator().manual_seed(len(name))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def of_tokens(*shape: int) -> Tensor:
        if not case.get("strided", False):
            return normal(batch, tokens, *shape).to(given)
        wide = normal(tokens, batch, *shape[:-1], 2 * shape[-1]).to(given)
        return wide.transpose(0, 1)[..., shape[-1] :]

    if op == "lerp_tokens":
        mixes, width = case["mixes"], heads * width
        found = {"x": of_tokens(width), "other": of_tokens(width), "weight": normal(mixes, width).to(dtype)}
        found["logits"] = of_tokens(mixes, width)
    elif op == "edit_keys":
        found = {"k": of_tokens(heads, width), "logits": of_tokens(heads, width)}
        found |= {key: normal(heads, width).to(dtype) for key in ("scale", "strength")}
        found["k"][0, 0] *= 1e-4
        found["logits"][:, 1] *= 20
    else:
        keys = width // 2 + 3
        found = {name: of_tokens(heads, width) for name in ("x", "gate", "v")}
        found |= {name: of_tokens(heads, keys) for name in ("q", "k")}
        found |= {key: normal(heads, width).to(dtype) for key in ("weight", "bias")}
        found["bonus"] = normal(heads, keys).to(dtype)
        found["x"][0, 0] *= 1e-3
    found = {
        key: t.detach().requires_grad_() for key, t in found.items() if key not in case.get("without", ())
    }
    return found | ({"activation": case["activation"]} if "activation" in case else {})


def errors(name: str, run: Callable[..., Any], dtype: torch.dtype) -> list[float]:
    """Of results and gradients, against the definition in float64 on equal values."""
    given = make(name, dtype)
    exact = {
        key: t.detach().double().requires_grad_() if isinstance(t, Tensor) else t for key, t in given.items()
    }
    definition = getattr(reference, CASES[name]["op"])
    return [error(f.double(), t) for f, t in zip(_found(run, given), _found(definition, exact), strict=True)]


def _found(run: Callable[..., Any], given: dict[str, Any]) -> list[Tensor]:
    """Each result, and gradients through all of them, and through the last one alone."""
    leaves = {key: t for key, t in given.items() if isinstance(t, Tensor)}
    found = run(**given)
    outputs = [*found] if isinstance(found, tuple) else [found]
    grads = [*gradients(outputs, leaves, torch.float16).values()]
    if len(outputs) > 1:
        grads += gradients([(*run(**given),)[-1]], leaves, torch.float16).values()
    return [*outputs, *grads]


def fused(name: str) -> list[float]:
    """With several runs of tokens, and several tiles in a run."""
    op = CASES[name]["op"]
    module = importlib.import_module(f"linear_moe.kernels.triton.{MODULES[op]}")
    small = dict(RUN=16, TILE=1) if op != "lerp_tokens" else dict(RUN=16, TILE=4, BLOCK=32)
    with mock.patch.multiple(module, **small):
        return errors(name, getattr(module, op), torch.float32)

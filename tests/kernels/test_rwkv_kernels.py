"""What stands around RWKV's recurrences: torch paths and fused kernels (interpreted) against definitions in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from run_interpreted import errors_of_picked
from rwkv_cases import CASES, errors, make
from torch import Tensor

from linear_moe import kernels
from linear_moe.kernels import dispatch

EXACT, SINGLE, HALF = 1e-12, 3e-6, 2e-3


@pytest.fixture(scope="module")
def fused_errors(request: pytest.FixtureRequest) -> Callable[[str], list[float]]:
    return errors_of_picked(request, "rwkv_cases")


@pytest.mark.parametrize("name", CASES)
def test_torch_path_is_exact(name: str) -> None:
    op = CASES[name]["op"]
    in_torch = next(b.run for b in dispatch.BACKENDS[op] if b.name == "chunked")
    assert max(errors(name, in_torch, torch.float64)) <= EXACT


@pytest.mark.parametrize("name", CASES)
def test_fused_kernel(name: str, fused_errors: Callable[[str], list[float]]) -> None:
    found = fused_errors(name)
    assert len(found) >= 4 and max(found) <= (HALF if "dtype" in CASES[name] else SINGLE), found


@pytest.mark.parametrize("name", ["five mixes of each token", "keys", "group norm, its own, gate"])
def test_half_precision_computes_in_float32_and_keeps_inputs_only(name: str) -> None:
    op, inputs = getattr(kernels, CASES[name]["op"]), make(name, torch.float32)
    inputs = {
        key: t.detach().bfloat16().requires_grad_() if isinstance(t, Tensor) else t
        for key, t in inputs.items()
    }
    ours = {t.untyped_storage().data_ptr() for t in inputs.values() if isinstance(t, Tensor)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = op(**inputs)
    assert kept and {t.untyped_storage().data_ptr() for t in kept} <= ours
    wide = op(**{key: t.float() if isinstance(t, Tensor) else t for key, t in inputs.items()})
    for y, exact in zip(*((t if isinstance(t, tuple) else (t,)) for t in (found, wide))):
        assert y.dtype == torch.bfloat16 and torch.equal(y, exact.bfloat16())


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape)


LERP: dict[str, Any] = dict(x=zeros(1, 2, 6), other=zeros(1, 2, 6), weight=zeros(3, 6))
EDIT: dict[str, Any] = dict(
    k=zeros(1, 2, 3, 4), logits=zeros(1, 2, 3, 4), scale=zeros(3, 4), strength=zeros(3, 4)
)
NORM: dict[str, Any] = dict(x=zeros(1, 2, 3, 4), weight=zeros(3, 4), bias=zeros(3, 4))


@pytest.mark.parametrize(
    ("op", "given", "change", "message"),
    [
        ("lerp_tokens", LERP, dict(x=zeros(1, 2, 3, 4)), r"x has shape \[1, 2, 3, 4\]"),
        ("lerp_tokens", LERP, dict(x=zeros(1, 2, 6).int()), "x is torch.int32"),
        ("lerp_tokens", LERP, dict(other=zeros(1, 3, 6)), r"other has shape \[1, 3, 6\]"),
        ("lerp_tokens", LERP, dict(weight=None), "weight is None as logits is"),
        ("lerp_tokens", LERP, dict(weight=zeros(3, 5)), r"weight has shape \[3, 5\]"),
        ("lerp_tokens", LERP, dict(logits=zeros(1, 2, 2, 6)), r"logits has shape \[1, 2, 2, 6\]"),
        ("lerp_tokens", LERP, dict(weight=None, logits=zeros(1, 2)), r"logits has shape \[1, 2\]"),
        ("lerp_tokens", LERP, dict(activation="swish"), "activation is 'swish'"),
        ("edit_keys", EDIT, dict(k=zeros(1, 2, 12)), r"k has shape \[1, 2, 12\]"),
        ("edit_keys", EDIT, dict(logits=zeros(1, 2, 3, 5)), r"logits has shape \[1, 2, 3, 5\]"),
        ("edit_keys", EDIT, dict(scale=zeros(4)), r"scale has shape \[4\]"),
        ("edit_keys", EDIT, dict(strength=zeros(3, 4).int()), "strength is torch.int32"),
        ("gated_group_norm", NORM, dict(x=zeros(1, 2, 12)), r"x has shape \[1, 2, 12\]"),
        ("gated_group_norm", NORM, dict(bias=zeros(4)), r"bias has shape \[4\]"),
        ("gated_group_norm", NORM, dict(gate=zeros(1, 2, 3, 5)), r"gate has shape \[1, 2, 3, 5\]"),
        ("gated_group_norm", NORM, dict(q=zeros(1, 2, 3, 4)), "k is None"),
        ("gated_group_norm", NORM, dict(activation="tanh"), "activation is 'tanh'"),
    ],
)
def test_refuses_what_does_not_fit(op: str, given: dict, change: dict, message: str) -> None:
    getattr(kernels, op)(**given)
    with pytest.raises(ValueError, match=message):
        getattr(kernels, op)(**{**given, **change})

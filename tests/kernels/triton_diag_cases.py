"""Cases of the fused diagonal-decay scan, which run_interpreted.py runs in Triton's interpreter."""

from __future__ import annotations

from functools import partial
from unittest import mock

import fused_scans
import pytest
import torch
from fused_scans import (
    FORGET,
    ONE,
    after_the_last_document,
    configured,
    decay_of,
    decays,
    no_documents,
    one_projection,
    some_gradients,
    through_one_result,
)
from interpreted_cases import Cases, Errors
from scan_cases import PACKED, error, make, results

from linear_moe import kernels
from linear_moe.kernels import reference

OP = "diag_decay"
CASES = Cases()
case, fused = CASES.add, CASES.run
compare = partial(fused_scans.compare, OP, processors=4)
SHORT = (0, 0, 1, 18, 18, 50)
"""Documents like PACKED, in 60 tokens."""


def sudden(tensors: dict[str, torch.Tensor]) -> None:
    decay_of(tensors)[:, 10:60:2] = -30.0
    decay_of(tensors)[:, 70:90] = -200.0


def total(tensors: dict[str, torch.Tensor]) -> None:
    sudden(tensors)
    decay_of(tensors)[:, 17:130:29] = FORGET


def uneven(tensors: dict[str, torch.Tensor]) -> None:
    """Elements that forget at once beside elements that hardly forget."""
    total(tensors)
    decay_of(tensors)[..., ::3] = -1e-3


def weak(tensors: dict[str, torch.Tensor]) -> None:
    """What float16's chunks keep is enough for one border for all of their pairs, but in the second."""
    decay_of(tensors)[:] *= 0.1
    decay_of(tensors)[:, 70:80, :, 3] = -3.0


for decay in ("none", "head", "scalar"):
    few = {} if decay == "scalar" else ONE
    case(f"{decay} rows", decay, num_tokens=50, **few)(compare)
    case(f"{decay} rows in segments", decay, num_tokens=150, batch=1, groups=1, num_heads=2, processors=16)(
        compare
    )
    documents = (
        dict(num_tokens=210, cu_seqlens=PACKED)
        if decay == "scalar"
        else dict(num_tokens=60, cu_seqlens=SHORT)
    )
    case(f"{decay} packed", decay, groups=1, num_heads=2, **documents)(compare)
    case(f"{decay} without state", decay, num_tokens=20, has_state=False, **ONE)(compare)
    wide = dict(num_keys=16, num_values=256, cu_seqlens=SHORT)
    case(f"{decay} wide values by parts", decay, num_tokens=60, **wide, **ONE)(compare)
    case(f"{decay} half precision", decay, num_tokens=150, chunk=None, dtype=torch.float16, **ONE)(compare)
for decay, num_values in (
    ("head", 64),
    ("scalar", 128),
):  # blocks of columns without masks, as wide as registers allow
    whole = dict(num_keys=64, num_values=num_values, chunk=None, dtype=torch.float16)
    case(f"{decay} half precision, whole tiles", decay, num_tokens=150, **whole, **ONE)(compare)
case("chunks as shipped", "scalar", num_tokens=75, chunk=None, **ONE)(compare)
case("one token", "scalar", num_tokens=1, **ONE)(compare)
case("groups and blocks of columns", "scalar", num_tokens=20, batch=1, num_keys=40, num_values=35)(compare)
case("keys wider than values", "none", num_tokens=20, num_keys=130, num_values=3, **ONE)(compare)
for processors in (0, 16):
    long = dict(num_tokens=140, processors=processors, **ONE)
    case(f"sudden forgetting, {processors}", "scalar", strength=0.01, change=sudden, **long)(compare)
    case(f"total forgetting, {processors}", "scalar", strength=0.01, change=total, **long)(compare)
    case(f"weak, {processors}", "head", change=decays(-1e-3), **long)(compare)
    for decay in ("head", "scalar"):
        case(f"e^-30, {decay}, {processors}", decay, change=decays(-30.0), **long)(compare)
        case(f"forgets all, {decay}, {processors}", decay, change=decays(FORGET), **long)(compare)
VECTORS = {"vector": ("vector", ""), "bonus": ("vector", "bonus"), "values": ("none", "log_decay_v")}
for name, (decay, extra) in VECTORS.items():
    kind = dict(decay=decay, extra=extra)
    case(f"{name} rows", num_tokens=90, batch=2, groups=1, num_heads=2, processors=0, **kind)(compare)
    case(f"{name} packed", num_tokens=60, cu_seqlens=SHORT, groups=1, num_heads=2, **kind)(compare)
    case(f"{name} half precision", num_tokens=150, chunk=None, dtype=torch.float16, **kind, **ONE)(compare)
    border = dict(num_keys=16, num_values=16, chunk=None, dtype=torch.float16, change=weak, **kind, **ONE)
    case(f"{name} weak half precision", num_tokens=200, processors=0, **border)(compare)
    documents = dict(num_tokens=200, cu_seqlens=(0, 0, 1, 18, 130, 195))
    case(f"{name} weak half precision packed", **documents, **border)(compare)
    for processors in (0, 16):
        long = dict(num_tokens=140, processors=processors, **kind, **ONE)
        case(f"{name} uneven forgetting, {processors}", strength=0.01, change=uneven, **long)(compare)
        case(f"{name} e^-30, {processors}", change=decays(-30.0), **long)(compare)
    case(f"{name} forgets all", change=decays(FORGET), num_tokens=40, has_state=False, **kind, **ONE)(compare)
    wide = dict(num_keys=20, num_values=40) if name == "values" else dict(num_keys=40, num_values=20)
    sizes = dict(num_tokens=20, batch=1, num_heads=2, groups=1, **wide)
    case(f"{name} groups and blocks of columns", **sizes, **kind)(compare)
case("bonus without decay", "none", extra="bonus", num_tokens=20, **ONE)(compare)
case("bonus with a decay per head", "head", extra="bonus", num_tokens=20, **ONE)(compare)
case("values and scalar", "scalar", extra="log_decay_v", num_tokens=50, **ONE)(compare)
case("values and head, packed", "head", extra="log_decay_v", num_tokens=60, cu_seqlens=SHORT, **ONE)(compare)


@case("strided, no copy")
def strided() -> Errors:
    """Its arguments are views, and no kernel gets a copy of one."""
    found: Errors = {}
    for decay, extra in (("scalar", ""), ("vector", ""), ("none", "log_decay_v")):
        inputs = make(OP, decay, extra=extra, num_tokens=41, groups=2, num_heads=2, num_values=6)
        inputs = inputs.to(torch.float32)
        one_projection(inputs.tensors)
        views = [inputs.tensors[name] for name in inputs.tensors if name != "state"]
        assert not any(x.is_contiguous() for x in views)
        with configured(16, 4), torch.no_grad(), mock.patch.object(torch.Tensor, "contiguous", only_states):
            o, state = inputs.run(kernels)
        truth = inputs.to(torch.float64).run(reference)
        found[f"o {decay}"], found[f"state {decay}"] = error(o, truth[0]), error(state, truth[1])
        sizes = dict(num_tokens=41, groups=4, num_values=6, change=one_projection, batch=1)
        errors = compare(decay, extra=extra, **sizes)
        found.update({f"{decay} {name}": value for name, value in errors.items()})
    return found


def only_states(x: torch.Tensor) -> torch.Tensor:
    assert x.shape[1] != 41, "a copy"
    return x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)


LAST = dict(num_tokens=90, cu_seqlens=(0, 20, 20, 57), processors=4)
case("tokens after the last document", OP, "scalar", **LAST)(after_the_last_document)
case("tokens after the last document, vector", OP, "vector", extra="bonus", **LAST)(after_the_last_document)
case("tokens after the last document, values", OP, "none", extra="log_decay_v", **LAST)(
    after_the_last_document
)
case("no documents", OP)(no_documents)
for name, decay in (("", "scalar"), (", vector", "vector")):
    one = dict(num_tokens=100, processors=(0, 16))
    case("gradient through one result only" + name, OP, decay, **one)(through_one_result)
some = dict(num_tokens=40, processors=4)
case("some inputs have no gradient", OP, "scalar", **some)(some_gradients)
case("some inputs have no gradient, vector", OP, "vector", extra="bonus", **some)(some_gradients)
case("some inputs have no gradient, values", OP, "none", extra="log_decay_v", **some)(some_gradients)


@case("same bits in every run", "scalar")
@case("same bits in every run, vector", "vector")
def same_bits(decay: str) -> Errors:
    inputs = make(OP, decay, num_tokens=60, cu_seqlens=(0, 35, 60), num_heads=1, groups=1)
    inputs = inputs.to(torch.float32)
    with configured(16, 4):
        first, second = (results(inputs, kernels) for _ in range(2))
    return {name: float(not torch.equal(x, second[name])) for name, x in first.items()}


@case("documents never see each other", "scalar")
@case("documents never see each other, vector", "vector")
def isolated(decay: str) -> Errors:
    inputs = make(OP, decay, num_tokens=210, cu_seqlens=PACKED, groups=1, num_heads=1)
    inputs = inputs.to(torch.float32)
    with configured(16, 4):
        o, state = inputs.run(kernels)
        for name in ("q", "k", "v", "log_decay"):
            inputs.tensors[name][:, 72:137] *= 3.0
        changed_o, changed_state = inputs.run(kernels)
    tokens = [t for t in range(210) if not 72 <= t < 137]
    documents = [n for n in range(len(PACKED) - 1) if n != 6]
    same_o = torch.equal(o[:, tokens], changed_o[:, tokens])
    same_state = torch.equal(state[documents], changed_state[documents])
    return {
        "o": float(not same_o),
        "state": float(not same_state),
        "it changed": float(torch.equal(o, changed_o)),
    }


@case("what is not fused runs on torch")
def not_fused() -> Errors:
    from linear_moe.kernels.triton import diag

    found: Errors = {}
    with mock.patch.object(diag, "diag_decay", side_effect=AssertionError("not for this call")):
        inputs = make(OP, "vector", extra="log_decay_v", num_tokens=20).to(torch.float32)
        found["vectors on both sides"] = error(inputs.run(kernels)[0], inputs.run(reference)[0])
        inputs = make(OP, "scalar", num_tokens=20)
        found["float64"] = error(inputs.run(kernels)[0], inputs.run(reference)[0])
        with pytest.raises(AssertionError, match="not for this call"):
            inputs.to(torch.float32).run(kernels)
    return found

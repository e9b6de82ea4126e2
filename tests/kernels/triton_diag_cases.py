"""Cases of the fused diagonal-decay scan, which run_interpreted.py runs in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from interpreted_cases import Cases, Errors
from scan_cases import PACKED, Inputs, error, make, results

from linear_moe import kernels
from linear_moe.kernels import reference

CASES = Cases()
case, fused = CASES.add, CASES.run
FORGET = float("-inf")
SHORT = (0, 0, 1, 18, 18, 50)
"""Documents like PACKED, in 60 tokens."""
SMALL = dict(batch=1, groups=1, num_heads=1)


def compare(
    decay: str,
    *,
    dtype: torch.dtype = torch.float32,
    change: Callable[[dict[str, torch.Tensor]], None] | None = None,
    chunk: int | None = 16,
    processors: int = 4,
    **sizes: Any,
) -> Errors:
    """Outputs, final state and gradients against the token loop; short chunks make more of them."""
    inputs = make("diag_decay", decay, **sizes)
    if change is not None:
        change(inputs.tensors)
    inputs = inputs.to(dtype)
    with configured(chunk, processors):
        found = results(inputs, kernels)
    truth = results(inputs.to(torch.float64), reference)
    return {name: error(found[name], value) for name, value in truth.items()}


def configured(chunk: int | None, processors: int) -> Any:
    """More ``processors`` cut rows into more segments; none leave them whole."""
    from linear_moe.kernels.triton import configs

    size = configs.chunk_size if chunk is None else lambda dtype: chunk
    return mock.patch.multiple(configs, chunk_size=size, num_processors=lambda device: processors)


def decays(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: decay_of(tensors).fill_(value)


def decay_of(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return tensors["log_decay" if "log_decay" in tensors else "log_decay_v"]


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


def one_projection(tensors: dict[str, torch.Tensor]) -> None:
    """q, k, v as slices of one fused projection in Megatron's [T, B, ...] order, the decay of another."""
    names = "q", "k", "v"
    fused_TBHP = torch.cat([tensors[name] for name in names], -1).transpose(0, 1).contiguous()
    for name, x_TBHD in zip(names, fused_TBHP.split(6, -1)):
        tensors[name] = x_TBHD.transpose(0, 1)
    for name in ("log_decay", "log_decay_v"):
        if name in tensors:
            tensors[name] = tensors[name].transpose(0, 2).contiguous().transpose(0, 2)


for decay in ("none", "head", "scalar"):
    few = {} if decay == "scalar" else SMALL
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
    case(f"{decay} without state", decay, num_tokens=20, has_state=False, **SMALL)(compare)
    case(f"{decay} half precision", decay, num_tokens=150, chunk=None, dtype=torch.float16, **SMALL)(compare)
case("chunks as shipped", "scalar", num_tokens=75, chunk=None, **SMALL)(compare)
case("one token", "scalar", num_tokens=1, **SMALL)(compare)
case("groups and blocks of columns", "scalar", num_tokens=20, batch=1, num_keys=40, num_values=35)(compare)
case("keys wider than values", "none", num_tokens=20, num_keys=130, num_values=3, **SMALL)(compare)
for processors in (0, 16):
    long = dict(num_tokens=140, processors=processors, **SMALL)
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
    case(f"{name} half precision", num_tokens=150, chunk=None, dtype=torch.float16, **kind, **SMALL)(compare)
    for processors in (0, 16):
        long = dict(num_tokens=140, processors=processors, **kind, **SMALL)
        case(f"{name} uneven forgetting, {processors}", strength=0.01, change=uneven, **long)(compare)
        case(f"{name} e^-30, {processors}", change=decays(-30.0), **long)(compare)
    case(f"{name} forgets all", change=decays(FORGET), num_tokens=40, has_state=False, **kind, **SMALL)(
        compare
    )
    wide = dict(num_keys=20, num_values=40) if name == "values" else dict(num_keys=40, num_values=20)
    sizes = dict(num_tokens=20, batch=1, num_heads=2, groups=1, **wide)
    case(f"{name} groups and blocks of columns", **sizes, **kind)(compare)
case("bonus without decay", "none", extra="bonus", num_tokens=20, **SMALL)(compare)
case("bonus with a decay per head", "head", extra="bonus", num_tokens=20, **SMALL)(compare)
case("values and scalar", "scalar", extra="log_decay_v", num_tokens=50, **SMALL)(compare)
case("values and head, packed", "head", extra="log_decay_v", num_tokens=60, cu_seqlens=SHORT, **SMALL)(
    compare
)


@case("strided, no copy")
def strided() -> Errors:
    """Its arguments are views, and no kernel gets a copy of one."""
    found: Errors = {}
    for decay, extra in (("scalar", ""), ("vector", ""), ("none", "log_decay_v")):
        inputs = make("diag_decay", decay, extra=extra, num_tokens=41, groups=2, num_heads=2, num_values=6)
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


@case("tokens after the last document", "scalar", "")
@case("tokens after the last document, vector", "vector", "bonus")
@case("tokens after the last document, values", "none", "log_decay_v")
def after_the_last_document(decay: str, extra: str) -> Errors:
    """They give zeros and get zero gradients, whatever they hold."""
    sizes = dict(num_tokens=90, cu_seqlens=(0, 20, 20, 57), num_heads=1, groups=1)
    inputs = make("diag_decay", decay, extra=extra, **sizes).to(torch.float32)
    truth = results(inputs.to(torch.float64), reference)
    of_tokens = [name for name in inputs.tensors if name not in ("state", "bonus", "cu_seqlens")]
    for name in of_tokens:
        inputs.tensors[name][:, 57:] = float("nan")
    with configured(16, 4):
        found = results(inputs, kernels)
    assert all((found[name][:, 57:] == 0).all() for name in ("o", *(f"grad {name}" for name in of_tokens)))
    return {name: error(found[name], value) for name, value in truth.items()}


@case("no documents")
def no_documents() -> Errors:
    inputs = make("diag_decay", "head", num_tokens=20, cu_seqlens=(0, 0, 0), num_heads=1, groups=1)
    o, state = inputs.to(torch.float32).run(kernels)
    return {"o": o.abs().max().item(), "state": error(state, inputs.tensors["state"])}


@case("gradient through one result only", "scalar")
@case("gradient through one result only, vector", "vector")
def through_one_result(decay: str) -> Errors:
    found: Errors = {}
    for index in (0, 1):
        for processors in (0, 16):
            single = make("diag_decay", decay, num_tokens=100, **SMALL).to(torch.float32)
            names = [name for name in single.tensors if name != "q" or index == 0]
            grads = []
            for inputs, module in ((single, kernels), (single.to(torch.float64), reference)):
                inputs = inputs.differentiable()
                with configured(16, processors):
                    y = inputs.run(module)[index].square().sum()
                    grads.append(torch.autograd.grad(y, [inputs.tensors[name] for name in names]))
            for name, *pair in zip(names, *grads):
                found[f"{name} from {index}, {processors}"] = error(*pair)
    return found


@case("some inputs have no gradient", "scalar", "")
@case("some inputs have no gradient, vector", "vector", "bonus")
@case("some inputs have no gradient, values", "none", "log_decay_v")
def some_gradients(decay: str, extra: str) -> Errors:
    """Each alone, so that a run that serves another is not missed."""
    single = make("diag_decay", decay, extra=extra, num_tokens=40, **SMALL).to(torch.float32)
    truth = results(single.to(torch.float64), reference)
    found: Errors = {}
    for name in single.tensors:
        inputs = Inputs("diag_decay", {n: x.detach() for n, x in single.tensors.items()})
        inputs.tensors[name].requires_grad_()
        generator = torch.Generator().manual_seed(1)
        with configured(16, 4):
            outputs = inputs.run(kernels)
            grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64).float() for x in outputs]
            used = [(x, grad) for x, grad in zip(outputs, grads) if x.requires_grad]
            torch.autograd.backward([x for x, _ in used], [grad for _, grad in used])
        found[name] = error(inputs.tensors[name].grad, truth[f"grad {name}"])
    return found


@case("same bits in every run", "scalar")
@case("same bits in every run, vector", "vector")
def same_bits(decay: str) -> Errors:
    inputs = make("diag_decay", decay, num_tokens=60, cu_seqlens=(0, 35, 60), num_heads=1, groups=1)
    inputs = inputs.to(torch.float32)
    with configured(16, 4):
        first, second = (results(inputs, kernels) for _ in range(2))
    return {name: float(not torch.equal(x, second[name])) for name, x in first.items()}


@case("documents never see each other", "scalar")
@case("documents never see each other, vector", "vector")
def isolated(decay: str) -> Errors:
    inputs = make("diag_decay", decay, num_tokens=210, cu_seqlens=PACKED, groups=1, num_heads=1)
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
        inputs = make("diag_decay", "vector", extra="log_decay_v", num_tokens=20).to(torch.float32)
        found["vectors on both sides"] = error(inputs.run(kernels)[0], inputs.run(reference)[0])
        inputs = make("diag_decay", "scalar", num_tokens=20)
        found["float64"] = error(inputs.run(kernels)[0], inputs.run(reference)[0])
        with pytest.raises(AssertionError, match="not for this call"):
            inputs.to(torch.float32).run(kernels)
    return found

"""Cases of the fused diagonal-decay scan, for Triton's interpreter: ``python triton_diag_cases.py NAME ...``.

Triton decides when it is imported whether it interprets, so this runs in a process of its own, started by
test_triton_diag.py, and prints one JSON line for each case: the errors of each result.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ.update(TRITON_INTERPRET="1", LINEAR_MOE_KERNELS="triton")
    sys.path.insert(0, str(Path(__file__).parents[2]))

import pytest
import torch
from scan_cases import PACKED, Inputs, error, make, poison_empty, results

from linear_moe import kernels
from linear_moe.kernels import reference

Errors = dict[str, float]
CASES: dict[str, Callable[[], Errors]] = {}
FORGET = float("-inf")
SMALL = dict(batch=1, groups=1, num_heads=1)


def case(name: str, *args: Any, **kwargs: Any) -> Callable[[Callable[..., Errors]], Callable[..., Errors]]:
    def add(function: Callable[..., Errors]) -> Callable[..., Errors]:
        assert name not in CASES
        CASES[name] = lambda: function(*args, **kwargs)
        return function

    return add


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
    """More ``processors`` cut rows into more segments; few leave them whole."""
    from linear_moe.kernels.triton import configs

    size = configs.chunk_size if chunk is None else lambda dtype: chunk
    return mock.patch.multiple(configs, chunk_size=size, num_processors=lambda device: processors)


def decays(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors["log_decay"].fill_(value)


def sudden(tensors: dict[str, torch.Tensor]) -> None:
    tensors["log_decay"][:, 10:60:2] = -30.0
    tensors["log_decay"][:, 70:90] = -200.0


def total(tensors: dict[str, torch.Tensor]) -> None:
    sudden(tensors)
    tensors["log_decay"][:, 17:130:29] = FORGET


def one_projection(tensors: dict[str, torch.Tensor]) -> None:
    """q, k, v as slices of one fused projection in Megatron's [T, B, ...] order, the decay of another."""
    names = "q", "k", "v"
    fused_TBHP = torch.cat([tensors[name] for name in names], -1).transpose(0, 1).contiguous()
    for name, x_TBHD in zip(names, fused_TBHP.split(6, -1)):
        tensors[name] = x_TBHD.transpose(0, 1)
    tensors["log_decay"] = tensors["log_decay"].permute(2, 1, 0).contiguous().permute(2, 1, 0)


for decay in ("none", "head", "scalar"):
    few = {} if decay == "scalar" else SMALL
    case(f"{decay} rows", decay, num_tokens=50, **few)(compare)
    case(f"{decay} rows in segments", decay, num_tokens=150, batch=1, groups=1, num_heads=2, processors=16)(
        compare
    )
    case(f"{decay} packed", decay, num_tokens=210, cu_seqlens=PACKED, groups=1, num_heads=2)(compare)
    case(f"{decay} without state", decay, num_tokens=20, has_state=False, **SMALL)(compare)
    case(f"{decay} half precision", decay, num_tokens=150, chunk=None, dtype=torch.float16, **SMALL)(compare)
case("chunks as shipped", "scalar", num_tokens=75, chunk=None, **SMALL)(compare)
case("one token", "scalar", num_tokens=1, **SMALL)(compare)
case("groups and blocks of columns", "scalar", num_tokens=37, batch=1, num_keys=40, num_values=70)(compare)
case("keys wider than values", "none", num_tokens=20, num_keys=130, num_values=3, **SMALL)(compare)
for processors in (2, 16):
    long = dict(num_tokens=140, processors=processors, **SMALL)
    case(f"sudden forgetting, {processors}", "scalar", strength=0.01, change=sudden, **long)(compare)
    case(f"total forgetting, {processors}", "scalar", strength=0.01, change=total, **long)(compare)
    case(f"weak, {processors}", "head", change=decays(-1e-3), **long)(compare)
    for decay in ("head", "scalar"):
        case(f"e^-30, {decay}, {processors}", decay, change=decays(-30.0), **long)(compare)
        case(f"forgets all, {decay}, {processors}", decay, change=decays(FORGET), **long)(compare)


@case("strided, no copy")
def strided() -> Errors:
    from linear_moe.kernels.triton import diag

    def unchanged(x: torch.Tensor) -> torch.Tensor:
        assert x.stride(-1) == 1 and not x.is_contiguous()
        return x

    leave_alone = diag._rows_together
    with mock.patch.object(
        diag, "_rows_together", lambda x: unchanged(x) if x.shape[1] == 41 else leave_alone(x)
    ):
        inputs = make("diag_decay", "scalar", num_tokens=41, groups=2, num_heads=2, num_values=6)
        one_projection(inputs.tensors)
        inputs = inputs.to(torch.float32)
        one_projection(inputs.tensors)
        with configured(16, 4), torch.no_grad():
            o, state = inputs.run(kernels)
    truth = inputs.to(torch.float64).run(reference)
    forward = {"o": error(o, truth[0]), "state": error(state, truth[1])}
    return {
        **forward,
        **compare("scalar", num_tokens=41, groups=4, num_values=6, change=one_projection, batch=1),
    }


@case("tokens after the last document")
def after_the_last_document() -> Errors:
    """They give zeros and get zero gradients, whatever they hold."""
    inputs = make("diag_decay", "scalar", num_tokens=90, cu_seqlens=(0, 20, 20, 57), num_heads=1, groups=1)
    inputs = inputs.to(torch.float32)
    truth = results(inputs.to(torch.float64), reference)
    for name in ("q", "k", "v", "log_decay"):
        inputs.tensors[name][:, 57:] = float("nan")
    with configured(16, 4):
        found = results(inputs, kernels)
    assert all(
        (found[name][:, 57:] == 0).all() for name in ("o", "grad q", "grad k", "grad v", "grad log_decay")
    )
    return {name: error(found[name], value) for name, value in truth.items()}


@case("no documents")
def no_documents() -> Errors:
    inputs = make("diag_decay", "head", num_tokens=20, cu_seqlens=(0, 0, 0), num_heads=1, groups=1)
    o, state = inputs.to(torch.float32).run(kernels)
    return {"o": o.abs().max().item(), "state": error(state, inputs.tensors["state"])}


@case("gradient through one result only")
def through_one_result() -> Errors:
    found: Errors = {}
    for index in (0, 1):
        for processors in (2, 16):
            single = make("diag_decay", "scalar", num_tokens=100, **SMALL).to(torch.float32)
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


@case("some inputs have no gradient")
def some_gradients() -> Errors:
    """Each alone, so that a run that serves another is not missed."""
    single = make("diag_decay", "scalar", num_tokens=40, **SMALL).to(torch.float32)
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


@case("same bits in every run")
def same_bits() -> Errors:
    inputs = make("diag_decay", "scalar", num_tokens=120, cu_seqlens=(0, 70, 120), num_heads=2, groups=1)
    inputs = inputs.to(torch.float32)
    with configured(16, 4):
        first, second = (results(inputs, kernels) for _ in range(2))
    return {name: float(not torch.equal(x, second[name])) for name, x in first.items()}


@case("documents never see each other")
def isolated() -> Errors:
    inputs = make("diag_decay", "scalar", num_tokens=210, cu_seqlens=PACKED, groups=1, num_heads=1)
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
        for decay, extra in (("vector", ""), ("scalar", "bonus"), ("scalar", "log_decay_v")):
            inputs = make("diag_decay", decay, extra=extra, num_tokens=20).to(torch.float32)
            found[f"{decay} {extra}"] = error(inputs.run(kernels)[0], inputs.run(reference)[0])
        inputs = make("diag_decay", "scalar", num_tokens=20)
        found["float64"] = error(inputs.run(kernels)[0], inputs.run(reference)[0])
        with pytest.raises(AssertionError, match="not for this call"):
            inputs.to(torch.float32).run(kernels)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    poison_empty(pytest.MonkeyPatch())
    for name in sys.argv[1:]:
        try:
            outcome: Errors | str = CASES[name]()
        except Exception:  # the other cases go on
            outcome = traceback.format_exc()
        print(json.dumps([name, outcome]), flush=True)

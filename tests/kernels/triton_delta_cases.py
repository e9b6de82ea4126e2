"""Cases of the fused delta rule, which run_interpreted.py runs in Triton's interpreter."""

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

Change = Callable[[dict[str, torch.Tensor]], None]
CASES = Cases()
case, fused = CASES.add, CASES.run
FORGET = float("-inf")
SMALL = dict(batch=1, groups=1, num_heads=1)
DECAYS = ("none", "head", "scalar", "vector")


def compare(
    decay: str,
    *,
    dtype: torch.dtype = torch.float32,
    change: Change | None = None,
    chunk: int | None = 16,
    processors: int = 1,
    **sizes: Any,
) -> Errors:
    """Outputs, final state and gradients against the token loop; short chunks make more of them."""
    inputs = make("delta_rule", decay, **sizes)
    if change is not None:
        change(inputs.tensors)
    inputs = inputs.to(dtype)
    with chunked(chunk, processors):
        found = results(inputs, kernels)
    truth = results(inputs.to(torch.float64), reference)
    return {name: error(found[name], value) for name, value in truth.items()}


def chunked(size: int | None, processors: int = 1) -> Any:
    """More ``processors`` cut rows in more pieces."""
    from linear_moe.kernels.triton import configs, delta_configs

    chosen = configs.chunk_size if size is None else lambda dtype: size
    delta_configs.MIN_CHUNKS = 1
    return mock.patch.multiple(configs, chunk_size=chosen, num_processors=lambda device: processors)


def decays(value: float) -> Change:
    return lambda tensors: tensors["log_decay"].fill_(value)


def sudden(tensors: dict[str, torch.Tensor]) -> None:
    tensors["log_decay"][:, 5:30:2] = -30.0
    tensors["log_decay"][:, 35:45] = -200.0


def total(tensors: dict[str, torch.Tensor]) -> None:
    sudden(tensors)
    tensors["log_decay"][:, 7:60:19] = FORGET


def betas(value: float) -> Change:
    return lambda tensors: tensors["beta"].fill_(value)


def repeated_keys(tensors: dict[str, torch.Tensor]) -> None:
    """One key for all tokens, always erased in full: the worst case for the inverse."""
    tensors["k"][:] = tensors["k"][:, :1].clone()
    tensors["beta"].fill_(1.0)


def one_projection(tensors: dict[str, torch.Tensor]) -> None:
    """q, k, v as slices of one fused projection in Megatron's [T, B, ...] order, gates of another."""
    names = "q", "k", "v"
    fused_TBHP = torch.cat([tensors[name] for name in names], -1).transpose(0, 1).contiguous()
    for name, x_TBHD in zip(names, fused_TBHP.split(6, -1)):
        tensors[name] = x_TBHD.transpose(0, 1)
    for name in ("beta", "log_decay"):
        dims = (2, 1, 0, 3)[: tensors[name].ndim]
        tensors[name] = tensors[name].permute(*dims).contiguous().permute(*dims)


for decay in DECAYS:
    case(f"{decay} rows", decay, num_tokens=50, **({} if decay in ("head", "vector") else SMALL))(compare)
    if decay != "none":
        case(f"{decay} strong", decay, num_tokens=40, change=decays(-30.0), **SMALL)(compare)
        case(f"{decay} forgets all", decay, num_tokens=40, change=decays(FORGET), **SMALL)(compare)
    case(f"{decay} pieces", decay, num_tokens=130, processors=5, **SMALL)(compare)
    if decay not in ("none", "head"):
        case(f"{decay} packed", decay, chunk=32, num_tokens=210, cu_seqlens=PACKED, groups=1, num_heads=1)(
            compare
        )
        case(f"{decay} half precision", decay, num_tokens=80, chunk=None, dtype=torch.float16, **SMALL)(
            compare
        )
        case(f"{decay} repeated keys", decay, num_tokens=70, chunk=64, change=repeated_keys, **SMALL)(compare)
        strong = dict(num_tokens=50, strength=0.01, **SMALL)
        case(f"{decay} now and then", decay, change=sudden, **strong)(compare)
        case(f"{decay} now and then all", decay, change=total, **strong)(compare)
        case(f"{decay} weak", decay, num_tokens=40, chunk=None, change=decays(-1e-3), **SMALL)(compare)
        case(f"{decay} one token", decay, num_tokens=1, has_state=False, **SMALL)(compare)
        case(f"{decay} blocks", decay, num_tokens=17, batch=1, num_keys=40, num_values=40, num_heads=2)(
            compare
        )
        case(f"{decay} nothing written", decay, num_tokens=20, change=betas(0.0), **SMALL)(compare)
case("pieces of two rows", "scalar", num_tokens=75, processors=8, groups=1, num_heads=1, has_state=False)(
    compare
)
case("keys wider than values", "none", num_tokens=20, num_keys=130, num_values=3, **SMALL)(compare)


def strided(decay: str) -> Errors:
    from linear_moe.kernels.triton import delta

    def unchanged(x: torch.Tensor) -> torch.Tensor:
        assert x.stride(-1) == 1 and not x.is_contiguous()
        return x

    with mock.patch.object(delta, "rows_together", unchanged):
        inputs = make("delta_rule", decay, num_tokens=41, groups=2, num_heads=2, num_values=6)
        one_projection(inputs.tensors)
        inputs = inputs.to(torch.float32)
        one_projection(inputs.tensors)
        with chunked(16), torch.no_grad():
            o, state = inputs.run(kernels)
    truth = inputs.to(torch.float64).run(reference)
    forward = {"o": error(o, truth[0]), "state": error(state, truth[1])}
    sizes = dict(num_tokens=41, groups=2, num_heads=2, num_values=6, batch=1)
    return {**forward, **compare(decay, change=one_projection, **sizes)}


def after_the_last_document(decay: str) -> Errors:
    """Tokens there give zeros and get zero gradients, whatever they hold."""
    inputs = make("delta_rule", decay, num_tokens=70, cu_seqlens=(0, 20, 20, 37), num_heads=1, groups=1)
    inputs = inputs.to(torch.float32)
    truth = results(inputs.to(torch.float64), reference)
    names = [name for name in inputs.tensors if name not in ("state", "cu_seqlens")]
    for name in names:
        inputs.tensors[name][:, 37:] = float("nan")
    with chunked(16):
        found = results(inputs, kernels)
    assert all((found[name][:, 37:] == 0).all() for name in ["o", *(f"grad {name}" for name in names)])
    return {name: error(found[name], value) for name, value in truth.items()}


def isolated(decay: str) -> Errors:
    """Documents never see each other: the same bits, whatever one of them holds; and the same bits in every run."""
    inputs = make("delta_rule", decay, num_tokens=60, cu_seqlens=(0, 5, 5, 40, 60), groups=1, num_heads=1)
    inputs = inputs.to(torch.float32)
    with chunked(16):
        first, second = (results(inputs, kernels) for _ in range(2))
        for name in ("q", "v", "beta"):
            inputs.tensors[name][:, 5:40] *= 0.5
        changed = inputs.run(kernels)
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    tokens, documents = [t for t in range(60) if not 5 <= t < 40], [0, 1, 3]
    same_o = torch.equal(first["o"][:, tokens], changed[0][:, tokens])
    same_state = torch.equal(first["state_out"][documents], changed[1][documents])
    moved = not torch.equal(first["o"], changed[0])
    return {"o": float(not same_o), "state": float(not same_state), "it changed": float(not moved)}


for decay in DECAYS[2:]:
    case(f"{decay} strided, no copy", decay)(strided)
    case(f"{decay} tokens after the last document", decay)(after_the_last_document)
    case(f"{decay} documents never see each other", decay)(isolated)


@case("no documents")
def no_documents() -> Errors:
    inputs = make("delta_rule", "head", num_tokens=20, cu_seqlens=(0, 0, 0), num_heads=1, groups=1)
    o, state = inputs.to(torch.float32).run(kernels)
    return {"o": o.abs().max().item(), "state": error(state, inputs.tensors["state"])}


@case("gradient through one result only")
def through_one_result() -> Errors:
    found: Errors = {}
    for index in (0, 1):
        single = make("delta_rule", "scalar", num_tokens=40, **SMALL).to(torch.float32)
        names = [name for name in single.tensors if name != "q" or index == 0]
        grads = []
        for inputs, module in ((single, kernels), (single.to(torch.float64), reference)):
            inputs = inputs.differentiable()
            with chunked(16):
                y = inputs.run(module)[index].square().sum()
                grads.append(torch.autograd.grad(y, [inputs.tensors[name] for name in names]))
        for name, *pair in zip(names, *grads):
            found[f"{name} from {index}"] = error(*pair)
    return found


@case("some inputs have no gradient")
def some_gradients() -> Errors:
    """Each alone."""
    single = make("delta_rule", "scalar", num_tokens=20, **SMALL).to(torch.float32)
    truth = results(single.to(torch.float64), reference)
    found: Errors = {}
    for name in single.tensors:
        inputs = Inputs("delta_rule", {n: x.detach() for n, x in single.tensors.items()})
        inputs.tensors[name].requires_grad_()
        generator = torch.Generator().manual_seed(1)
        with chunked(16):
            outputs = inputs.run(kernels)
            grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64).float() for x in outputs]
            torch.autograd.backward(outputs, grads, inputs=[inputs.tensors[name]])
        found[name] = error(inputs.tensors[name].grad, truth[f"grad {name}"])
    return found


@case("runs fused")
def runs_fused() -> Errors:
    from linear_moe.kernels.triton import delta

    found: Errors = {}
    with mock.patch.object(delta, "delta_rule", side_effect=AssertionError("not for this call")):
        inputs = make("delta_rule", "scalar", num_tokens=20)
        found["float64"] = error(inputs.run(kernels)[0], inputs.run(reference)[0])
        for decay in DECAYS:
            with pytest.raises(AssertionError, match="not for this call"):
                make("delta_rule", decay, num_tokens=20).to(torch.float32).run(kernels)
    return found

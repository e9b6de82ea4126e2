"""What cases of fused scans and of fused segments share: settings, inputs that are hard, and cases that hold for all.

Their truth is the token loop in float64, on equal values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from interpreted_cases import Errors
from scan_cases import Inputs, error, make, results
from torch import Tensor

from linear_moe import kernels
from linear_moe.kernels import reference

Change = Callable[[dict[str, Tensor]], None]
"""Of the tensors of a call, in place."""
Results = Callable[[Inputs, Any], dict[str, Tensor]]
"""What a backend computes, gradients included, by name."""
FORGET = float("-inf")
ONE = dict(batch=1, groups=1, num_heads=1)


@contextmanager
def configured(chunk: int | None = 16, processors: int = 1) -> Iterator[None]:
    """Chunks of ``chunk`` tokens, None for those as shipped: short ones make more of them.

    More ``processors`` cut rows into more segments, or pieces; none leave them whole.
    """
    from linear_moe.kernels.triton import configs, delta_configs

    size = configs.chunk_size if chunk is None else lambda *of: chunk
    with (
        mock.patch.multiple(configs, chunk_size=size, num_processors=lambda device: processors),
        mock.patch.object(delta_configs, "MIN_CHUNKS", 1),
    ):
        yield


def decays(value: float) -> Change:
    return lambda tensors: decay_of(tensors).fill_(value)


def decay_of(tensors: dict[str, Tensor]) -> Tensor:
    return tensors["log_decay" if "log_decay" in tensors else "log_decay_v"]


def repeated_keys(tensors: dict[str, Tensor]) -> None:
    """One key for all tokens, always erased in full: the worst case for the inverse."""
    tensors["k"][:] = tensors["k"][:, :1].clone()
    tensors["beta"].fill_(1.0)


def one_projection(tensors: dict[str, Tensor], names: tuple[str, ...] = ("q", "k", "v")) -> None:
    """``names`` as slices of one fused projection in Megatron's [T, B, ...] order, gates of another."""
    fused_TBHP = torch.cat([tensors[name] for name in names], -1).transpose(0, 1).contiguous()
    for name, x_TBHD in zip(names, fused_TBHP.split(6, -1)):
        tensors[name] = x_TBHD.transpose(0, 1)
    for name in {"beta", "log_decay", "log_decay_v"} & tensors.keys():
        dims = (2, 1, 0, 3)[: tensors[name].ndim]
        tensors[name] = tensors[name].permute(*dims).contiguous().permute(*dims)


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> Errors:
    assert found.keys() == truth.keys()
    return {name: error(found[name], value) for name, value in truth.items()}


def compare(
    op: str,
    decay: str,
    *,
    dtype: torch.dtype = torch.float32,
    change: Change | None = None,
    chunk: int | None = 16,
    processors: int = 1,
    results: Results = results,
    errors: Callable[..., Errors] = errors,
    **sizes: Any,
) -> Errors:
    """Results, gradients among them, of one call."""
    inputs = make(op, decay, **sizes)
    if change is not None:
        change(inputs.tensors)
    inputs = inputs.to(dtype)
    with configured(chunk, processors):
        found = results(inputs, kernels)
    return errors(found, results(inputs.to(torch.float64), reference))


def after_the_last_document(
    op: str,
    decay: str,
    *,
    processors: int = 1,
    results: Results = results,
    errors: Callable[..., Errors] = errors,
    **sizes: Any,
) -> Errors:
    """Tokens there give zeros and get zero gradients, whatever they hold."""
    inputs = make(op, decay, groups=1, num_heads=1, **sizes).to(torch.float32)
    truth = results(inputs.to(torch.float64), reference)
    end = inputs.tensors["cu_seqlens"][-1]
    of_tokens = [
        n for n in inputs.tensors if n not in ("state", "bonus", "cu_seqlens") and f"grad {n}" in truth
    ]
    for name in of_tokens:
        inputs.tensors[name][:, end:] = float("nan")
    with configured(16, processors):
        found = results(inputs, kernels)
    zeros = [*(f"grad {name}" for name in of_tokens), *({"o"} & found.keys())]
    assert all((found[name][:, end:] == 0).all() for name in zeros)
    return errors(found, truth)


def no_documents(op: str) -> Errors:
    inputs = make(op, "head", num_tokens=20, cu_seqlens=(0, 0, 0), num_heads=1, groups=1)
    o, state = inputs.to(torch.float32).run(kernels)
    return {"o": o.abs().max().item(), "state": error(state, inputs.tensors["state"])}


def through_one_result(op: str, decay: str, *, processors: tuple[int, ...] = (1,), **sizes: Any) -> Errors:
    """Gradients of the output alone, and of the final state alone."""
    found: Errors = {}
    for index in (0, 1):
        for count in processors:
            single = make(op, decay, **sizes, **ONE).to(torch.float32)
            names = [name for name in single.tensors if name != "q" or index == 0]
            grads = []
            for inputs, module in ((single, kernels), (single.to(torch.float64), reference)):
                inputs = inputs.differentiable()
                with configured(16, count):
                    y = inputs.run(module)[index].square().sum()
                    grads.append(torch.autograd.grad(y, [inputs.tensors[name] for name in names]))
            for name, *pair in zip(names, *grads):
                found[f"{name} from {index}, {count}"] = error(*pair)
    return found


def some_gradients(op: str, decay: str, *, processors: int = 1, **sizes: Any) -> Errors:
    """Of each input alone, so that a run that serves another is not missed."""
    single = make(op, decay, **sizes, **ONE).to(torch.float32)
    truth = results(single.to(torch.float64), reference)
    found: Errors = {}
    for name in single.tensors:
        inputs = Inputs(op, {n: x.detach() for n, x in single.tensors.items()})
        inputs.tensors[name].requires_grad_()
        generator = torch.Generator().manual_seed(1)
        with configured(16, processors):
            outputs = inputs.run(kernels)
            grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64).float() for x in outputs]
            used = [(x, grad) for x, grad in zip(outputs, grads) if x.requires_grad]
            torch.autograd.backward([x for x, _ in used], [grad for _, grad in used])
        found[name] = error(inputs.tensors[name].grad, truth[f"grad {name}"])
    return found

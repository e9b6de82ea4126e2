"""What fused kernels keep for their backward pass, seen from outside; run_interpreted.py runs these cases.

A case is one operation. A tensor changed between forward and backward must be noticed, or the gradients must not need
it. What autograd's hooks move elsewhere and give back in another layout, as offloading and checkpoints do, must be all
that was kept, and give the same gradients.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from interpreted_cases import Cases
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from linear_moe import kernels
from linear_moe.kernels import Segment

TOKENS, HEADS, KEYS, VALUES = 13, 2, 16, 8
KEY, VALUE, SCALAR = (TOKENS, HEADS, KEYS), (TOKENS, HEADS, VALUES), (TOKENS, HEADS)
READ, WRITTEN = dict(q=KEY, k=KEY, v=VALUE), dict(k=KEY, v=VALUE)
DOCUMENTS = torch.tensor([0, 7, 7, 13])

CASES = Cases()
fused = CASES.run
Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


def seen(op: str, shapes: Shapes, **options: Any) -> list[str]:
    """What is wrong, in words."""
    torch.manual_seed(0)
    leaves = {name: drawn(name, shape) for name, shape in shapes.items()}
    call = lambda inputs: total(getattr(kernels, op)(**inputs, **options))  # noqa: E731
    inputs = as_used(leaves)
    loss = call(inputs)
    expected = gradients(loss, leaves, retain_graph=True)
    found = [
        f"{name} can be changed unnoticed"
        for name, x in inputs.items()
        if not is_noticed(x, loss, leaves, expected)
    ]

    with saved_tensors_hooks(lambda x: x.detach().clone(memory_format=torch.contiguous_format), lambda x: x):
        inputs = as_used(leaves)
        storages = {name: StorageWeakRef(x.untyped_storage()) for name, x in inputs.items()}
        loss = call(inputs)
    del inputs, call
    gc.collect()
    found += [f"{name} is held" for name, storage in storages.items() if not storage.expired()]
    if not same(gradients(loss, leaves), expected):
        found.append("other gradients from tensors that hooks have moved")
    return found


def is_noticed(x: Tensor, loss: Tensor, leaves: Tensors, expected: list[Tensor]) -> bool:
    """Whether a backward pass fails after a change of ``x``, which is then undone; or gives the same."""
    version, old = x._version, x.detach().clone()
    with torch.no_grad():
        x.mul_(0.5)
    try:
        return same(gradients(loss, leaves, retain_graph=True), expected)
    except RuntimeError as error:
        return "modified by an inplace operation" in str(error)
    finally:
        x.detach().copy_(old)
        torch._C._autograd._unsafe_set_version_counter((x,), (version,))


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """Decays are negative, beta is in (0, 1)."""
    x = torch.randn(shape) / max(shape) ** 0.5
    x = -x.abs() if name.startswith("log_decay") else x.sigmoid() if name == "beta" else x
    return x.requires_grad_()


def as_used(leaves: Tensors) -> Tensors:
    """What an operation gets: no leaves, and of tokens ``[1, T, ...]`` in the memory of ``[T, 2, ...]``."""
    return {
        name: torch.stack([x, x], 1).transpose(0, 1)[:1] if x.shape[0] == TOKENS else x * 1
        for name, x in leaves.items()
    }


def total(outputs: Any) -> Tensor:
    """A random weighted sum of all."""
    if isinstance(outputs, Segment):
        outputs = outputs.state, outputs.decay, outputs.log_decay
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator, sums = torch.Generator().manual_seed(1), []
    for y in outputs:
        if y is not None:
            sums.append((y * torch.randn(y.shape, generator=generator)).sum())
    return torch.stack(sums).sum()


def gradients(loss: Tensor, leaves: Tensors, **options: bool) -> list[Tensor]:
    """Of all leaves."""
    return list(torch.autograd.grad(loss, list(leaves.values()), **options))


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Bit for bit."""
    return all(map(torch.equal, found, expected))


def add(name: str, op: str, shapes: Shapes, **options: Any) -> None:
    """A case, its inputs' shapes as given."""
    CASES.add(name, op, shapes, **options)(seen)


def add_scan(name: str, op: str, shapes: Shapes, packed: bool = False, **others: tuple[int, ...]) -> None:
    """A case of a recurrence, with a state, or of what it does to one."""
    shapes = {**shapes, **others}
    if not op.endswith("_segment"):
        shapes["state"] = (len(DOCUMENTS) - 1 if packed else 1, HEADS, KEYS, VALUES)
    add(name, op, shapes, cu_seqlens=DOCUMENTS if packed else None)


add_scan("no decay", "diag_decay", READ)
add_scan("decay of heads", "diag_decay", READ, log_decay=(HEADS,))
add_scan("scalar decay", "diag_decay", READ, packed=True, log_decay=SCALAR)
add_scan("vector decay", "diag_decay", READ, packed=True, log_decay=KEY, bonus=(HEADS, KEYS))
add_scan("decay of columns", "diag_decay", READ, log_decay_v=VALUE)
add_scan("delta rule, decay of heads", "delta_rule", READ, packed=True, beta=SCALAR, log_decay=(HEADS,))
add_scan("delta rule, vector decay", "delta_rule", READ, beta=SCALAR, log_decay=KEY)
add_scan("low rank", "dplr_delta_rule", READ, packed=True, a=KEY, b=KEY, log_decay=KEY)
add_scan("segment, decay of heads", "diag_decay_segment", WRITTEN, log_decay=(HEADS,))
add_scan("segment, vector decay", "diag_decay_segment", WRITTEN, packed=True, log_decay=KEY)
add_scan("segment, delta rule", "delta_rule_segment", WRITTEN, packed=True, beta=SCALAR, log_decay=(HEADS,))
add_scan("segment, low rank", "dplr_delta_rule_segment", WRITTEN, a=KEY, b=KEY, log_decay=KEY)

add(
    "short convolution",
    "short_conv",
    dict(x=KEY, weight=(HEADS, KEYS, 4), bias=(HEADS, KEYS), state=(1, 3, HEADS, KEYS)),
    activation="silu",
)
add(
    "short convolution of parts",
    "conv_and_split",
    dict(x=KEY, weight=(HEADS, KEYS // 2, 4), bias=(HEADS, KEYS // 2)),
    widths=(KEYS // 2, KEYS - KEYS // 2),
)
add("short convolution packed", "short_conv", dict(x=KEY, weight=(HEADS, KEYS, 4)), cu_seqlens=DOCUMENTS)
add("gated norm", "gated_rms_norm", dict(x=KEY, weight=(KEYS,), gate=KEY))
add("log decay", "log_decay_of", dict(x=KEY, rate=(HEADS,), bias=(HEADS, KEYS)))
add("bounded decay", "bounded_decay_of", dict(x=KEY, bound=(HEADS, KEYS)))
add(
    "mixes",
    "lerp_tokens",
    dict(x=(TOKENS, KEYS), other=(TOKENS, KEYS), weight=(2, KEYS), logits=(TOKENS, 2, KEYS)),
)
add("edited keys", "edit_keys", dict(k=KEY, logits=KEY, scale=(HEADS, KEYS), strength=(HEADS, KEYS)))
add(
    "group norm",
    "gated_group_norm",
    dict(
        x=VALUE,
        weight=(HEADS, VALUES),
        bias=(HEADS, VALUES),
        gate=VALUE,
        q=KEY,
        k=KEY,
        v=VALUE,
        bonus=(HEADS, KEYS),
    ),
)
add("heads times a number", "scale_heads", dict(x=KEY, weight=SCALAR))
add("rotary positions", "rotate_heads", dict(q=KEY, k=KEY), angles=torch.randn(1, TOKENS, KEYS // 2))
add("norm of a residual stream", "rms_norm", dict(x=(TOKENS, KEYS), weight=(KEYS,)))
add(
    "skip, gate and norm",
    "skip_gate_norm",
    dict(x=KEY, skip=KEY, skip_weight=(HEADS,), weight=(HEADS, KEYS), gate=KEY),
)

"""Cases of the fused short convolution, which run_interpreted.py runs in Triton's interpreter."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import torch
from interpreted_cases import Cases
from scan_cases import error
from test_short_conv import PACKED, WIDTHS, make, make_wide, results

from linear_moe.kernels import reference

CASES = Cases()
case, fused = CASES.add, CASES.run


def compare(activation: str | None, **sizes: Any) -> float:
    return _largest(make(**sizes), activation)


for (width, channels), (cu, activation) in itertools.product(
    ((1, (5,)), (2, (2, 3)), (3, (2, 2, 3)), (4, (2, 70))),
    ((None, "silu"), (PACKED, "silu"), ((0, 17), None)),
):
    sizes = dict(width=width, cu_seqlens=cu, channels=channels)
    rows = "rows" if cu is None else len(cu) - 1
    case(f"width {width}, {rows}, {activation}, {channels}", activation, **sizes)(compare)


@case("no bias, no history, strided")
def plain() -> float:
    """x and the gradient of y are slices of wider tensors, time first, as Megatron keeps them."""
    exact = make()
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(40, 2, 3, 7, generator=generator, dtype=torch.float64).transpose(0, 1)
    exact["x"] = wide[..., 3:5].detach().requires_grad_()
    exact["bias"] = exact["state"] = None
    return _largest(exact, "silu")


@case("filters tap by tap, biases apart in memory")
def turned() -> float:
    exact = make()
    exact["weight"] = exact["weight"].detach().movedim(-1, 0).contiguous().movedim(0, -1).requires_grad_()
    exact["bias"] = torch.stack([exact["bias"].detach()] * 2, -1)[..., 0].requires_grad_()
    return _largest(exact, "silu")


@case("parts, packed", (0, 0, 1, 9, 14), 4)
@case("some of the parts are used, time first", None, 2, used=(0, 3))
def parts(cu: tuple[int, ...] | None, width: int, used: Any = None) -> float:
    """Of a fused projection, one of them wider than a block."""
    exact = make_wide(num_tokens=15 if cu else 5, width=width, cu_seqlens=cu)
    if cu is None:
        exact["x"] = exact["x"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    return _largest(exact, "silu", "conv_and_split", used, widths=WIDTHS)


def _largest(
    exact: dict[str, Any], activation: str | None, op: str = "short_conv", used: Any = None, **options: Any
) -> float:
    from linear_moe.kernels.triton import short_conv

    single = {n: x if x is None or not x.is_floating_point() else _same_strides(x) for n, x in exact.items()}
    with mock.patch.object(short_conv, "RUN", 16):  # tokens of more than one program
        found = results(getattr(short_conv, op), single, activation, used, **options)
    truth = results(getattr(reference, op), exact, activation, used, **options)
    return max(float(error(f.double(), t)) for f, t in zip(found, truth, strict=True))


def _same_strides(x: torch.Tensor) -> torch.Tensor:
    """As float32, with the strides of ``x``, so that a slice stays one."""
    room = torch.zeros(1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride())))
    return room.as_strided(x.shape, x.stride()).copy_(x.detach()).requires_grad_()

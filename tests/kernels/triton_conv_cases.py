"""Cases of the fused short convolution, for Triton's interpreter, in a process of its own as triton_diag_cases.py.

Prints one JSON line for each case: the largest error of outputs, final inputs and gradients against the token loop.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from scan_cases import error, poison_empty
from test_short_conv import PACKED, make, results

from linear_moe.kernels import reference

Case = tuple[int, tuple[int, ...] | None, str | None, tuple[int, ...]]
"""Width, cu_seqlens, activation and channels."""
CASES: dict[str, Case] = {
    f"width {width}, {'rows' if cu is None else len(cu) - 1}, {activation}, {channels}": (
        width,
        cu,
        activation,
        channels,
    )
    for (width, channels), (cu, activation) in itertools.product(
        ((1, (5,)), (2, (2, 3)), (3, (2, 2, 3)), (4, (2, 70))),
        ((None, "silu"), (PACKED, "silu"), ((0, 17), None)),
    )
}
PLAIN = "no bias, no history, strided"


def errors(case: Case) -> float:
    width, cu_seqlens, activation, channels = case
    exact = make(width=width, cu_seqlens=cu_seqlens, channels=channels)
    return _largest(exact, activation)


def errors_plain() -> float:
    """x and the gradient of y are slices of wider tensors, time first, as Megatron keeps them."""
    exact = make()
    wide = torch.randn(40, 2, 3, 7, dtype=torch.float64).transpose(0, 1)
    exact["x"] = wide[..., 3:5].detach().requires_grad_()
    exact["bias"] = exact["state"] = None
    return _largest(exact, "silu")


def _largest(exact: dict[str, Any], activation: str | None) -> float:
    from linear_moe.kernels.triton import short_conv

    single = {n: x if x is None or not x.is_floating_point() else _same_strides(x) for n, x in exact.items()}
    with mock.patch.object(short_conv, "RUN", 32):  # tokens of more than one program
        found = results(short_conv.short_conv, single, activation)
    truth = results(reference.short_conv, exact, activation)
    return max(float(error(f.double(), t)) for f, t in zip(found, truth, strict=True))


def _same_strides(x: torch.Tensor) -> torch.Tensor:
    """As float32, with the strides of ``x``, so that a slice stays one."""
    room = torch.zeros(1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride())))
    return room.as_strided(x.shape, x.stride()).copy_(x.detach()).requires_grad_()


def main() -> None:
    import pytest

    with pytest.MonkeyPatch.context() as patch:
        poison_empty(patch)
        for name in sys.argv[1:]:
            found = errors_plain() if name == PLAIN else errors(CASES[name])
            print(json.dumps([name, found]), flush=True)


if __name__ == "__main__":
    main()

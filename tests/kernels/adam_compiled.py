"""Adam's step as compiled for Hopper, run on the emulator: a process of its own, since Triton must compile.

With the repository and its ``benchmarks`` on PYTHONPATH.
"""

from __future__ import annotations

import re

from compile_check import compiling_only  # isort: skip  # makes Triton compile, before its import

import torch
from emulator.launch import emulated
from torch import Tensor

from linear_moe.kernels import reference
from linear_moe.kernels.triton import adam

USUAL = dict(lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, decoupled=True, factor=0.3)


def given(size: int, dtype: torch.dtype | None, place: int) -> dict[str, Tensor]:
    """Random; the gradient and the copy begin at ``place``."""

    def normal(at: int = 0) -> Tensor:
        return torch.randn(at + size)[at:]

    found = {"param": normal(), "grad": normal(place), "exp_avg": normal(), "exp_avg_sq": normal().abs_()}
    return found if dtype is None else found | {"half": torch.zeros(place + size, dtype=dtype)[place:]}


def check(size: int, dtype: torch.dtype | None, place: int, **options: bool) -> None:
    """Against float64; the copy is the rounded parameter."""
    found = given(size, dtype, place)
    expected = {name: x.double() for name, x in found.items()}
    rest = USUAL | options | {"step": torch.tensor(3.0)}
    with emulated() as hazards:
        adam.adam_(**found, **rest)
    reference.adam_(**expected, **rest)
    for name in ("param", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-6, atol=1e-6)
    assert dtype is None or torch.equal(found["half"], found["param"].to(dtype))
    assert not hazards, hazards


def main() -> None:
    """Variants: kinds of copy, alignments, which decay; a block, and a part of one."""
    torch.manual_seed(0)
    check(1500, torch.bfloat16, 0)
    check(1504, torch.bfloat16, 0)
    check(1501, torch.float16, 1, decoupled=False)
    check(7, None, 0)
    kernels = list(adam.adam_kernel.device_caches[0][0].values())
    assert len(kernels) == 3, "the length is not compiled in"
    wide = re.findall(r"ld\.global\.v4|st\.global\.v[24]", kernels[0].asm["ptx"])
    assert len(wide) == 8, "four tensors are read and four written, 4 elements at a time"
    with compiling_only("adam_") as rows:
        adam.adam_(**given(3000, torch.bfloat16, 0), **USUAL, step=torch.tensor(3.0))
    assert all(row.spilled == 0 and row.registers <= 64 for row in rows), rows


if __name__ == "__main__":
    main()

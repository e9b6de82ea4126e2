"""Block sizes, warps and pipeline depth of the fused diagonal plus low-rank kernels, by rule: nothing is timed.

Whole calls were timed on an H100 (docs/kernels.md), not their neighbours. By benchmarks/compile_check.py all are inside
the shared memory of sm_90, and free of spills in half precision, but for 12 to 56 bytes in scans of 256 keys.
"""

from __future__ import annotations

import torch

from linear_moe.kernels.triton import configs, delta_configs
from linear_moe.kernels.triton.delta_configs import Cut
from linear_moe.kernels.triton.sizes import next_power_of_2


def solve(num_keys: int, dtype: torch.dtype) -> Cut:
    """Of the kernel that solves the chunks: narrow blocks of K in a loop, since four scores are in registers."""
    return Cut(16, 0, 8, 1)


def solve_weak(num_keys: int, dtype: torch.dtype) -> Cut:
    """The same where decays are weak (dplr_weak.py)."""
    return Cut(16, 0, 4, 1)


def least_kept(dtype: torch.dtype) -> float:
    """What a chunk must keep of every row of the memory for dplr_weak.py; above 1: never."""
    return 2.0 ** configs.least_total(16, dtype, False)


def scan(num_keys: int, num_values: int, dtype: torch.dtype) -> Cut:
    """Of the scan, either way: BK is the whole of K, S of BK x BV float32 stays in registers."""
    cut = delta_configs.backward_scan(num_keys, num_values, dtype)
    return Cut(cut.keys, 16, 8, 1) if cut.keys > 128 else cut


def read(num_keys: int, num_values: int, dtype: torch.dtype) -> Cut:
    """Of the kernel for outputs and dv: BK is the whole of K."""
    return delta_configs.output(num_keys, num_values, dtype)


def pairs(num_values: int, dtype: torch.dtype) -> Cut:
    """Of the kernel for the gradients of scores: blocks of V in a loop."""
    widest = 32 if dtype.itemsize == 2 and configs.has_wgmma() else 16
    return Cut(0, min(widest, max(16, next_power_of_2(num_values))), 8, 1)


def gradient(num_keys: int, num_values: int, dtype: torch.dtype) -> Cut:
    """Of the kernel for the other gradients: blocks of K in the grid, blocks of V in a loop."""
    values = max(16, next_power_of_2(num_values))
    if dtype.itemsize == 2:
        return Cut(16, 64 if values == 128 else min(32, values), 8, 1)
    return Cut(16, min(16, values), 8, 1)


def gradient_weak(num_keys: int, num_values: int, dtype: torch.dtype) -> Cut:
    """The same where decays are weak (dplr_weak.py); dims that need masks, which take registers, in narrower blocks."""
    keys, values = (max(16, next_power_of_2(dim)) for dim in (num_keys, num_values))
    widest = 32 if (keys, values) == (num_keys, num_values) else 16
    return Cut(min(widest, keys), min(64, values), 4, 1)

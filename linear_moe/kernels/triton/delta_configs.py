"""Block sizes, warps and pipeline depth of the fused delta-rule kernels, by rule: nothing is timed at run time.

Whole calls were timed on an H100 (docs/kernels.md), not their neighbours. By benchmarks/compile_check.py all are inside
the shared memory of sm_90 and free of spills, except float32 with K over 64: without tensor cores, its products are
written out over all of K.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from linear_moe.kernels.triton import configs
from linear_moe.kernels.triton.sizes import cdiv, next_power_of_2


@dataclass(frozen=True)
class Cut:
    """How one kernel is cut; letters as in delta.py."""

    keys: int
    """BK"""
    values: int
    """BV"""
    num_warps: int
    num_stages: int

    @property
    def launch(self) -> dict[str, int]:
        """What Triton's launcher takes."""
        blocks = dict(BK=self.keys, BV=self.values) if self.values else dict(BK=self.keys)
        return dict(**blocks, num_warps=self.num_warps, num_stages=self.num_stages)


MIN_PIECES, MIN_CHUNKS = 4, 8
"""What pieces do to a memory costs two more scans of them: fewer than 4 gain nothing."""


def pieces(programs: int, chunks: int, processors: int) -> int:
    """In how many pieces to scan rows of so many chunks, where whole ones are too few programs; no more than 32."""
    count = min(processors // programs, chunks // MIN_CHUNKS, 32)
    if count < MIN_PIECES:
        return 1
    size = cdiv(chunks, count)
    return cdiv(chunks, size)


def solve(num_keys: int, dtype: torch.dtype) -> Cut:
    """Of the kernel that solves the chunks: BK is the whole of K."""
    return Cut(_padded(num_keys), 0, 4 if dtype.itemsize == 2 and configs.has_wgmma() else 8, 1)


def solve_levels(num_keys: int, dtype: torch.dtype) -> Cut:
    """The same for decays per row: blocks of K in a loop."""
    is_small = dtype.itemsize == 2 and configs.has_wgmma()
    return Cut(
        min(16 if is_small and _is_masked(num_keys) else 32, _padded(num_keys)), 0, 4 if is_small else 8, 1
    )


def least_kept(dtype: torch.dtype) -> float:
    """What half a chunk must keep of every row of the memory for delta_weak.py, log2; above 0: never."""
    return configs.least_total(16, dtype, False)


def solve_weak(num_keys: int) -> tuple[Cut, int]:
    """Of the kernel that solves chunks whose decays are weak (delta_weak.py): blocks of K in loops.

    And how many columns it looks at, before, to know whether they are.
    """
    keys = _padded(num_keys)
    return Cut(min(16 if _is_masked(num_keys) else 32, keys), 0, 4, 1), min(128, keys)


def forward_scan(num_keys: int, num_values: int, dtype: torch.dtype) -> Cut:
    """Of the scan over chunks: BK is the whole of K, S of BK x BV float32 stays in registers."""
    keys, values = _padded(num_keys), _padded(num_values)
    if dtype.itemsize != 2:
        return Cut(keys, min(16, values), 8, 1)
    if not configs.has_wgmma():
        return Cut(keys, min(32 if keys <= 128 else 16, values), 8, 1)
    if keys > 128:
        return Cut(keys, min(32, values), 8, 1)
    if _is_masked(num_keys, num_values):
        return Cut(keys, min(16, values), 8, 2)
    return Cut(keys, min(32, values), 4, 2)


def backward_scan(num_keys: int, num_values: int, dtype: torch.dtype) -> Cut:
    """The same backward in time, with two more tiles of a chunk."""
    keys, values = _padded(num_keys), _padded(num_values)
    if dtype.itemsize != 2:
        return Cut(keys, min(16, values), 8, 1)
    if not configs.has_wgmma():
        return Cut(keys, min(32 if keys <= 128 else 16, values), 8, 1)
    if keys > 128 or _is_masked(num_keys, num_values):
        return Cut(keys, min(32, values), 8, 1)
    return Cut(keys, min(32, values), 4, 2)


def ahead(scan: Cut, is_long: bool) -> Cut:
    """A scan of the delta rule, which fetches two steps ahead where others fetch one: then no load is waited for.

    What it loads by hand takes registers: with masks, blocks of 32 columns spill in packed rows. ``is_long``: programs
    are so few that twice as many still have a multiprocessor each; steps of half as many columns are shorter.
    """
    if scan.num_stages == 2 and scan.num_warps == 4:
        return replace(scan, num_stages=3, values=min(16, scan.values) if is_long else scan.values)
    if configs.has_wgmma() and scan.num_warps == 8 and scan.keys <= 128:
        return replace(scan, values=min(16, scan.values))
    return scan


def output(num_keys: int, num_values: int, dtype: torch.dtype) -> Cut:
    """Of the kernel for outputs: BK is the whole of K."""
    keys, values = _padded(num_keys), _padded(num_values)
    if dtype.itemsize == 2:
        return Cut(keys, min(128 if keys <= 128 else 64, values), 4, 1)
    return Cut(keys, min(32, values), 8, 1)


def gradient(num_keys: int, num_values: int, dtype: torch.dtype) -> Cut:
    """Of the kernel for gradients: blocks of K in the grid, blocks of V in a loop, which holds registers apart."""
    keys, values = _padded(num_keys), _padded(num_values)
    if dtype.itemsize == 2 and not configs.has_wgmma():
        return Cut(min(32, keys), min(32, values), 8, 1)
    if dtype.itemsize == 2 and _is_masked(num_keys, num_values):
        return Cut(min(64, keys), 64 if values > 64 else min(32, values), 8, 2)
    if dtype.itemsize == 2:
        return Cut(min(64, keys), 64 if values > 64 else min(32, values), 4, 2)
    return Cut(min(32, keys), min(16, values), 8, 1)


def pairs(num_keys: int, num_values: int, dtype: torch.dtype) -> Cut:
    """Of the kernel for the gradients of scores, with a scalar decay or none: blocks of K and V in loops."""
    keys, values = _padded(num_keys), _padded(num_values)
    if dtype.itemsize == 2 and configs.has_wgmma():
        return Cut(min(64, keys), min(64, values), 4, 2)
    block = 32 if dtype.itemsize == 2 else 16
    return Cut(min(block, keys), min(block, values), 8, 1)


def vector_gradient(num_keys: int, num_values: int, dtype: torch.dtype) -> Cut:
    """The same for decays per row, with more of them."""
    keys, values = _padded(num_keys), _padded(num_values)
    if dtype.itemsize == 2 and not configs.has_wgmma():
        return Cut(16, 64 if values == 128 else min(32, values), 8, 1)
    if dtype.itemsize == 2:
        is_wide = keys == 128 and values <= 128 and not _is_masked(num_keys, num_values)
        return Cut(32 if is_wide else 16, min(32, values), 4, 1)
    return Cut(16, min(16, values), 8, 1)


def vector_gradient_weak(num_keys: int, num_values: int) -> Cut:
    """The same where decays are weak (delta_weak.py), in no more blocks; those of V are fetched two steps ahead."""
    keys, values = _padded(num_keys), _padded(num_values)
    return Cut(min(16 if _is_masked(num_keys, num_values) else 32, keys), min(32, values), 4, 3)


def vector_pairs(num_values: int, dtype: torch.dtype) -> Cut:
    """Of the kernel for the gradients of scores: blocks of V in a loop."""
    values = _padded(num_values)
    if dtype.itemsize == 2 and not configs.has_wgmma():
        return Cut(0, min(32, values), 8, 1)
    if dtype.itemsize == 2:
        return Cut(0, min(64, values), 4, 2 if values > 64 else 1)
    return Cut(0, min(16, values), 8, 1)


def _padded(dim: int) -> int:
    return max(16, next_power_of_2(dim))


def _is_masked(*dims: int) -> bool:
    """Whether loads need masks, which take registers."""
    return any(dim != _padded(dim) for dim in dims)

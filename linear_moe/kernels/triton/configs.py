"""Block sizes, warps and pipeline depth of the fused kernels, by rule: nothing is timed at run time.

On an H100 whole calls were timed with them (docs/kernels.md, "Measured"), their neighbours not yet. They were chosen by
rule: benchmarks/compile_check.py finds them free of spills in half precision on sm_90, but for the few that
docs/kernels.md lists, and inside its shared memory (227 KiB), twice inside where two programs are to share a
multiprocessor; wgmma wants at least 64 rows for 4 warps; and the fewer blocks of columns, the less often q and k are
read and multiplied. docs/kernels.md has the table, ``python -m linear_moe.bench kernels --sweep`` tries the neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from linear_moe.kernels.triton.sizes import cdiv, next_power_of_2


@dataclass(frozen=True)
class Blocks:
    """How one kernel is cut; letters as in diag_scan.py."""

    keys: int
    """BK, the whole of DK."""
    values: int
    """BV"""
    num_warps: int
    num_stages: int


SAVE_EVERY, SAVE_EVERY_PER_ELEMENT, SAVE_EVERY_PER_HEAD = 4, 2, 1
"""Chunks between saved states, where the decay has a gradient: more saves bytes, fewer is more exact in half precision.

A gradient per head is a sum over all tokens, and what a chunk inherits from the next is the same for all of its tokens:
an error that is a rounding for each of them grows with the chunk (float16, 4 against 1: 0.3 % against 0.03 %). Rarely
is a decay per head trained. For a decay per element, bfloat16's error of the gradient is 0.59 % at 4, 0.45 % at 2 and
0.36 % at 1 (weak decays, from float16 in the interpreter, times 8).
"""

MIN_CHUNKS = 4
"""Of a segment: a state costs as much memory traffic as K / 2 tokens of a chunk."""

PROGRAMS_PER_PROCESSOR = 2

NO_DECAY, HEAD_DECAY, TOKEN_DECAY = 0, 1, 2
"""Of diag_scan.py."""
WITHOUT_GRADIENT, READS, WRITES = 0, 1, 2
"""What a run of it leaves for the gradient of the decay: nothing, what tokens read, what they write."""


def blocks(num_keys: int, num_values: int, dtype: torch.dtype) -> Blocks:
    """For states.py, and for diag_scan.py without a decay; q and k of width ``num_keys`` and v of ``num_values``."""
    if dtype.itemsize == 4:  # no tensor cores: a product keeps rows of both factors in registers
        return _blocks(num_keys, num_values, 16, 8, 1)
    if not has_wgmma():
        return _without_wgmma(num_keys, num_values)
    return _blocks(num_keys, num_values, *((64, 4, 2) if num_keys <= 128 else (32, 8, 2)))


def scan_blocks(num_keys: int, num_values: int, dtype: torch.dtype, decay: int, role: int) -> Blocks:
    """For a run of diag_scan.py; ``role``: which sums for the gradient of the decay it leaves, if any."""
    if dtype.itemsize == 4 or decay == NO_DECAY:
        return blocks(num_keys, num_values, dtype)
    if not has_wgmma():
        return _without_wgmma(num_keys, num_values)
    if num_keys > 128:
        return _blocks(num_keys, num_values, 16, 8, 2 if role == WITHOUT_GRADIENT else 1)
    if _is_masked(num_keys, num_values):
        needs_more = role != WITHOUT_GRADIENT or num_keys > 64
        return _blocks(num_keys, num_values, 32, 8 if needs_more else 4, 2)
    # 8 warps share 64 rows in pairs, each with a product of its own: half the rate
    is_token, is_wide = decay == TOKEN_DECAY, num_keys > 64
    spills = is_wide and role != WITHOUT_GRADIENT and (is_token or (role == WRITES and num_values <= 64))
    return _blocks(num_keys, num_values, 32 if spills else 64, 4, 2)


def scaled_scan_blocks(num_keys: int, num_values: int, dtype: torch.dtype) -> Blocks:
    """For diag_vector_scan.py."""
    if dtype.itemsize == 4:
        return blocks(num_keys, num_values, dtype)
    if not has_wgmma():
        return _without_wgmma(num_keys, num_values)
    return _blocks(num_keys, num_values, 64, 4 if num_keys <= 128 else 8, 2)


def segment_blocks(width: int, other: int, dtype: torch.dtype, decays_rows: bool) -> Blocks:
    """For segment_state.py: blocks of both dims, since rows of a memory that nothing reads need no others."""
    if dtype.itemsize == 4:
        return _both(width, other, 32, 32, 8, 1)
    return _both(width, other, 64 if decays_rows else 128, 128, 4 if max(width, other) <= 64 else 8, 2)


def segment_gradient_blocks(width: int, other: int, dtype: torch.dtype) -> Blocks:
    """For segment_gradient.py: the whole of the dim that decays."""
    if dtype.itemsize == 4:
        return _both(width, other, 256, 16, 8, 1)
    values = 16 if _is_masked(width, other) else 32 if width > 64 else 64  # masks take registers
    return _both(width, other, 256, values, 4 if max(width, other) <= 64 else 8, 1)


def segment_chunk_size(width: int, dtype: torch.dtype) -> int:
    """Of both: float32 tiles of a chunk by the whole of that dim fill the registers."""
    return min(diag_chunk_size(dtype), 32 if width > 128 else 64)


def _both(width: int, other: int, keys: int, values: int, num_warps: int, num_stages: int) -> Blocks:
    widest = [max(16, next_power_of_2(dim)) for dim in (width, other)]
    return Blocks(min(keys, widest[0]), min(values, widest[1]), num_warps, num_stages)


def _blocks(num_keys: int, num_values: int, values: int, num_warps: int, num_stages: int) -> Blocks:
    if _is_masked(num_keys, num_values):
        values = min(values, 32)  # masks take registers
    keys = max(16, next_power_of_2(num_keys))
    widest = max(16, next_power_of_2(num_values))
    return Blocks(keys, min(values, widest), num_warps, num_stages)


def _without_wgmma(num_keys: int, num_values: int) -> Blocks:
    """For all scans: factors of products pass through registers, and a program has 99 KiB (sm_86, sm_89, sm_120)."""
    return _blocks(num_keys, num_values, 32 if num_keys <= 128 else 16, 8, 2 if num_keys <= 128 else 1)


def _is_masked(*dims: int) -> bool:
    return any(dim != next_power_of_2(dim) for dim in dims)


@dataclass(frozen=True)
class Columns:
    """How a kernel without a memory is cut: blocks of one dim, all of them by one program or by one each."""

    columns: int
    """BD"""
    num_warps: int
    num_stages: int
    part: int = 0
    """Columns at a time where registers are short."""


def scale_blocks(width: int, dtype: torch.dtype) -> Columns:
    """For diag_scale.py."""
    widest = max(16, next_power_of_2(width))
    if not has_wgmma():
        return Columns(min(32, widest), 8, 1)
    return Columns(min(64 if dtype.itemsize == 2 else 32, widest), 4, 1)


def combine_blocks(width: int, dtype: torch.dtype, has_weak: bool) -> Columns:
    """For diag_combine.py; ``has_weak``: with the way of diag_weak.py, whose tiles have columns as rows."""
    widest = max(16, next_power_of_2(width))
    if not has_wgmma():
        return Columns(16, 8, 1, 16)
    return Columns(min(64 if has_weak else 32, widest), 4, 1, min(32, widest))


def least_total(width: int, dtype: torch.dtype, has_bonus: bool) -> float:
    """What a chunk must keep of every column for diag_weak.py, log2; above 0: never.

    2^(half of it) times an input must stay far inside of the dtype, on both sides. A bonus, loads that are narrower
    because the width is no multiple of 16, and GPUs without wgmma take more registers than there are.
    """
    if dtype.itemsize == 4 or has_bonus or width % 16 != 0 or not has_wgmma():
        return 1.0
    return -120.0 if dtype == torch.bfloat16 else -8.0


def diag_chunk_size(dtype: torch.dtype) -> int:
    """Of the scan with diagonal decay; the same in every run of one call: sums of log decays start with a chunk."""
    return chunk_size(dtype) if dtype.itemsize == 2 else 16


def chunk_size(dtype: torch.dtype, num_keys: int = 0) -> int:
    """The same in every run of one call: sums of log decays start with a chunk."""
    is_short = num_keys > 128 and not has_wgmma()  # three tiles of a chunk by K in 99 KiB
    return (64 if dtype.itemsize == 2 else 32) // (2 if is_short else 1)


def segment_size(rows: int, num_tokens: int, heads: int, blocks: int, chunk: int, processors: int) -> int:
    """Tokens of a segment: the whole row if rows, heads and blocks of columns fill the device, else enough segments."""
    rows, all_tokens = deciding(rows, num_tokens)
    places = PROGRAMS_PER_PROCESSOR * processors
    per_row = max(1, places // (rows * heads * blocks))
    size = max(cdiv(cdiv(all_tokens, per_row), chunk), MIN_CHUNKS) * chunk
    if all_tokens == num_tokens:
        return size
    return chunk if size < all_tokens else cdiv(num_tokens, chunk) * chunk


_stands_for: tuple[int, int] | None = None  # not of a context: the backward pass has a thread of its own


@contextmanager
def standing_for(rows: int, num_tokens: int) -> Iterator[None]:
    """Rows are cut, into chunks, where so many rows of so many tokens would be cut, and else whole: for trial.py."""
    global _stands_for
    _stands_for = rows, num_tokens
    try:
        yield
    finally:
        _stands_for = None


def deciding(rows: int, num_tokens: int) -> tuple[int, int]:
    """Rows, and tokens of one, that decide how rows are cut."""
    return _stands_for or (rows, num_tokens)


@cache
def _has_wgmma(device: int) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def has_wgmma() -> bool:
    """Whether the current device, where kernels are launched, is a Hopper; true without any, in tests.

    The tables are for its products, which read shared memory. Elsewhere factors pass through registers.
    """
    return not torch.cuda.is_initialized() or _has_wgmma(torch.cuda.current_device())


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors; on a CPU, where only tests run, a small number."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count

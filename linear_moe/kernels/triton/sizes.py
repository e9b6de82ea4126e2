"""Sizes of grids and blocks, on the host: those of Triton are for kernels as well, which makes each call 2 us."""

from __future__ import annotations


def cdiv(count: int, size: int) -> int:
    """How many of ``size`` hold ``count``."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The first that is not below ``count``, which is at least 1."""
    return 1 << (count - 1).bit_length()

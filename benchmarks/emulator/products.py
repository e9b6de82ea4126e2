"""Which thread holds which element of a product of matrices, and where an asynchronous one finds its factors.

As the PTX manual draws them: mma.sync m16n8 of a warp, wgmma m64 of four, ldmatrix and stmatrix of 8 x 8.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from emulator.numbers import Array, as_type, halves

LANE = np.arange(32)
GROUP, PLACE = LANE // 4, LANE % 4


def mma(depth: int, kind: str, a: list[Array], b: list[Array], c: list[Array]) -> list[Array]:
    """16 x ``depth`` times ``depth`` x 8 for each warp, plus c; registers ``[warps, 32]`` of bits."""
    warps = c[0].shape[0]
    left, right = np.zeros((warps, 16, depth), np.float32), np.zeros((warps, depth, 8), np.float32)
    step = 1 if kind == "tf32" else 2
    for n, x in enumerate(a):
        _place(left.transpose(0, 2, 1), x, kind, step * PLACE + depth // 2 * (n // 2), GROUP + 8 * (n % 2))
    for n, x in enumerate(b):
        _place(right, x, kind, step * PLACE + depth // 2 * n, GROUP)
    total = np.zeros((warps, 16, 8), np.float32)
    places = [(GROUP + 8 * (n // 2), 2 * PLACE + n % 2) for n in range(4)]
    for x, (row, column) in zip(c, places):
        total[:, row, column] = as_type(x, "f32")
    total = total + left @ right
    return [np.ascontiguousarray(total[:, row, column]).view(np.uint32) for row, column in places]


def _place(tile: Array, x: Array, kind: str, depth: Array, other: Array) -> None:
    """Put what the lanes hold at ``[:, depth, other]``."""
    if kind == "tf32":
        tile[:, depth, other] = as_tf32(x)
        return
    for n, half in enumerate(halves(x)):
        tile[:, depth + n, other] = as_type(half, kind)


def as_tf32(x: Array) -> Array:
    """The tensor cores leave the last 13 bits out."""
    return as_type(x & np.uint32(0xFFFFE000), "f32")


def matrices_to_lanes(tiles: Array, transposed: bool) -> list[Array]:
    """``[warps, count, 8, 8]`` of 16 bits to ``count`` registers ``[warps, 32]``; ldmatrix."""
    tiles = tiles.swapaxes(2, 3) if transposed else tiles
    pairs = (
        tiles[:, :, GROUP, 2 * PLACE].astype(np.uint32),
        tiles[:, :, GROUP, 2 * PLACE + 1].astype(np.uint32),
    )
    registers = pairs[0] | (pairs[1] << np.uint32(16))
    return [registers[:, n] for n in range(tiles.shape[1])]


def lanes_to_matrices(registers: list[Array], transposed: bool) -> Array:
    """The inverse; stmatrix."""
    tiles = np.zeros((registers[0].shape[0], len(registers), 8, 8), np.uint16)
    for n, register in enumerate(registers):
        tiles[:, n, GROUP, 2 * PLACE], tiles[:, n, GROUP, 2 * PLACE + 1] = halves(register)
    return tiles.swapaxes(2, 3) if transposed else tiles


@cache
def described(descriptor: int, rows: int, transposed: bool) -> Array:
    """Addresses ``[rows, 16]`` of a factor of 16 bits of wgmma, by its descriptor of shared memory.

    Of 32 bits: every second one, where rows are not contiguous.
    """
    start = (descriptor & 0x3FFF) << 4
    leading, stride = ((descriptor >> 16) & 0x3FFF) << 4, ((descriptor >> 32) & 0x3FFF) << 4
    mode = descriptor >> 62
    width = {0: 16, 1: 128, 2: 64, 3: 32}[mode]
    assert (descriptor >> 49) & 7 == 0 and mode, "a base offset, or no swizzle"
    row, depth = np.arange(rows)[:, None], np.arange(16)[None]
    if transposed:  # rows are contiguous
        across = width // 2
        address = start + row // across * leading + row % across * 2 + depth // 8 * stride + depth % 8 * width
    else:
        address = start + row // 8 * stride + row % 8 * width + depth * 2
    return address ^ (((address >> 7) & {1: 7, 2: 3, 3: 1}[mode]) << 4)


@cache
def places_of_64_rows() -> list[tuple[Array, Array]]:
    """Row and column in the first 8 columns, of the four numbers that each of 128 threads has of them."""
    thread = np.arange(128)
    row, column = thread // 32 * 16 + thread % 32 // 4, 2 * (thread % 4)
    return [(row + 8 * (n // 2), column + n % 2) for n in range(4)]


def of_registers(registers: list[Array], kind: str) -> Array:
    """``[64, 16]``, or ``[64, 8]`` of TF32: the first factor of wgmma where it is in registers of 128 threads."""
    thread = np.arange(128)
    row, place = thread // 32 * 16 + thread % 32 // 4, thread % 4
    if kind == "tf32":
        tile = np.zeros((64, 8), np.float32)
        for n, register in enumerate(registers):
            tile[row + 8 * (n % 2), place + 4 * (n // 2)] = as_tf32(register)
        return tile
    tile = np.zeros((64, 16), np.float32)
    for n, register in enumerate(registers):
        for half, x in enumerate(halves(register)):
            tile[row + 8 * (n % 2), 2 * place + 8 * (n // 2) + half] = as_type(x, kind)
    return tile

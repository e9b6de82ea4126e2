"""Numbers as PTX has them, on numpy arrays with an entry for each thread; registers are unsigned, types are views."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any
"""Of numpy, or one of its scalars: what is the same in all threads."""

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES: dict[str, Any] = {
    **{f"{kind}{8 * size}": UNSIGNED[size] for size in UNSIGNED for kind in "bu"},
    **{
        "s8": np.int8,
        "s16": np.int16,
        "s32": np.int32,
        "s64": np.int64,
        "f32": np.float32,
        "f64": np.float64,
    },
}
UNDEFINED = {
    "p": False,
    "rs": np.uint16(0x7FC1),
    "r": np.uint32(0x7FC10001),
    "rd": np.uint64(0x7FF8000000000001),
}
"""What a register holds that nothing was written to: not a number."""


def size_of(kind: str) -> int:
    """Bytes."""
    return int(kind[1:]) // 8


def as_type(x: Array, kind: str) -> Array:
    """The bits of a register, or its lower ones, as numbers."""
    if kind == "bf16":
        return (cut(x, 2).astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind == "f16":
        return cut(x, 2).view(np.float16).astype(np.float32)
    return cut(x, size_of(kind)).view(TYPES[kind])


def as_bits(x: Array, kind: str) -> Array:
    """Numbers as the bits of a register; half precision from float32, rounded to nearest even."""
    if kind == "bf16":
        x = np.asarray(x, np.float32)
        bits = x.view(np.uint32)
        rounded = (
            (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        ).astype(np.uint16)
        return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)
    if kind == "f16":
        return np.asarray(x, np.float32).astype(np.float16).view(np.uint16)
    return np.asarray(x, TYPES[kind]).view(UNSIGNED[size_of(kind)])


def halves(x: Array) -> tuple[Array, Array]:
    """The lower and the upper 16 bits."""
    x = np.asarray(x)
    return (x & np.uint32(0xFFFF)).astype(np.uint16), (x >> np.uint32(16)).astype(np.uint16)


def joined(low: Array, high: Array) -> Array:
    """Two of 16 bits in one register."""
    return np.asarray(low).astype(np.uint32) | (np.asarray(high).astype(np.uint32) << np.uint32(16))


def to_tf32(x: Array) -> Array:
    """float32 rounded to ten bits, ties away from zero, as bits."""
    return (np.asarray(x, np.float32).view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)


def divide(a: Array, b: Array) -> Array:
    """Integers, towards zero; anything by zero."""
    a, b = np.asarray(a), np.asarray(b)
    b = np.where(b == 0, np.asarray(1, b.dtype), b)
    if a.dtype.kind == "u":
        return a // b
    quotient = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
    return (np.sign(a) * np.sign(b) * quotient).astype(a.dtype)


def remainder(a: Array, b: Array) -> Array:
    """With the sign of ``a``."""
    return (np.asarray(a) - divide(a, b) * b).astype(np.asarray(a).dtype)


def shift(a: Array, count: Array, left: bool) -> Array:
    """By more than the width: all bits are shifted out."""
    a, count = np.asarray(a), np.asarray(count).astype(np.int64)
    bits = 8 * a.dtype.itemsize
    within = np.minimum(count, bits - 1).astype(a.dtype)
    shifted = (a << within) if left else (a >> within)
    if left or a.dtype.kind == "u":
        shifted = np.where(count >= bits, np.asarray(0, a.dtype), shifted)
    return shifted.astype(a.dtype)


def funnel(low: Array, high: Array, count: Array, left: bool) -> Array:
    """32 of the 64 bits of ``high`` and ``low``, shifted: the upper ones to the left, the lower ones to the right."""
    both = np.asarray(low).astype(np.uint64) | np.asarray(high).astype(np.uint64) << np.uint64(32)
    by = np.asarray(count).astype(np.uint64) & np.uint64(31)
    return ((both << by) >> np.uint64(32) if left else both >> by).astype(np.uint32)


def bit_field(a: Array, start: Array, length: Array) -> Array:
    """``length`` bits from ``start``, extended by their sign where the type has one."""
    a, start, length = np.asarray(a), int(start) & 255, int(length) & 255
    unsigned = a.view(UNSIGNED[a.dtype.itemsize])
    kind = unsigned.dtype.type
    field = (unsigned >> kind(start)) & kind((1 << length) - 1)
    if a.dtype.kind == "u":
        return field
    rest = 8 * a.dtype.itemsize - length
    return (field << kind(rest)).view(a.dtype) >> a.dtype.type(rest)


def insert_field(a: Array, b: Array, start: Array, length: Array) -> Array:
    """``b`` with the lowest bits of ``a`` from ``start`` on."""
    kind = np.asarray(b).dtype.type
    mask = kind(((1 << int(length)) - 1) << int(start))
    return ((np.asarray(a) << kind(int(start))) & mask) | (np.asarray(b) & ~mask)


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """Four of the eight bytes of ``b`` and ``a``, or their signs."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    found = np.zeros(a.shape, np.uint32)
    for place in range(4):
        which = (selector >> np.uint32(4 * place)) & np.uint32(15)
        byte = ((both >> (np.uint64(8) * (which & np.uint32(7)).astype(np.uint64))) & np.uint64(255)).astype(
            np.uint32
        )
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        found = found | (np.where(which & np.uint32(8), sign, byte) << np.uint32(8 * place))
    return found


def cut(x: Array, size: int) -> Array:
    """The lower bits of a register, or wider ones filled with zeros."""
    x = np.asarray(x)
    return x.astype(UNSIGNED[size]) if x.dtype.itemsize != size else x

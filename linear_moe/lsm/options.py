"""Checks of a mixer's options: every value that cannot work is refused when a Config is made, in three parts."""

from __future__ import annotations

import dataclasses
import math
import typing

from linear_moe.kernels.checks import MAX_HEAD_DIM

SIMPLE = (int, float, bool, str, type(None))


def check_types(config: typing.Any) -> None:
    """Refuse a field whose value is not of its declared type (config.json may hold any); an int passes for a float."""
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    check_given(type(config), given)


def check_given(config_class: type, given: dict[str, typing.Any]) -> None:
    """:func:`check_types` of some fields, before there is a config."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if field.name not in given:
            continue
        value, hint = given[field.name], hints[field.name]
        types = typing.get_args(hint) or (hint,)
        if not all(kind in SIMPLE for kind in types):
            continue
        fits = type(value) in types or (type(value) is int and float in types)
        if not fits or (type(value) is float and not math.isfinite(value)):
            names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in types)
            raise ValueError(
                f"{field.name} is {value!r}\n"
                f"  why: it is {names}{', and finite' if float in types else ''}\n"
                f"  try: {_default(field)}"
            )


def one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse an option that is not in its list."""
    if value not in allowed:
        raise ValueError(f"{field} is {value!r}\n  why: known are {', '.join(allowed)}\n  try: {allowed[0]}")


def positive(field: str, value: float, why: str, default: object) -> None:
    """Refuse zero and less."""
    if value <= 0:
        raise ValueError(f"{field} is {value}\n  why: {why}\n  try: {default}")


def whole_width(field: str, factor: float, size_field: str, size: int, what: str) -> None:
    """Refuse a ``factor`` that, times ``size``, does not give ``what`` a whole number of channels, at least one."""
    width = factor * size
    if width != int(width) or width < 1:
        raise ValueError(
            f"{field} {factor} gives {what} of {width} channels\n"
            f"  why: it multiplies {size_field} {size} and must give a whole number\n"
            f"  try: {field} 1.0"
        )


def kernel_width(field: str, value: object, width: int, attempt: str) -> None:
    """Refuse an option that gives wider keys or values than the kernels take."""
    if width > MAX_HEAD_DIM:
        raise ValueError(
            f"{field} {value} gives a head of {width} channels\n"
            f"  why: the kernels take keys and values of up to {MAX_HEAD_DIM}\n"
            f"  try: {attempt}"
        )


def heads_in(channels: float, field: str, head_dim: int) -> int:
    """How many heads of the option ``field`` make up ``channels``; refuses a number that is not whole."""
    if head_dim < 1 or channels < head_dim or channels % head_dim:
        fits = [width for width in range(1, 129) if channels >= width and channels % width == 0]
        raise ValueError(
            f"{field} is {head_dim}\n"
            f"  why: {channels:g} channels must make a whole number of heads\n"
            f"  try: {fits[-1] if fits else 'more channels'}"
        )
    return int(channels // head_dim)


def _default(field: dataclasses.Field) -> str:
    return "a number" if field.default is dataclasses.MISSING else repr(field.default)

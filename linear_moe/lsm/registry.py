"""The mixers by name: what ``--la-module`` and ``LA_MODULE`` may say."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from linear_moe.lsm.mixer import Mixer

_MIXERS: dict[str, type[Mixer]] = {}


def register(name: str) -> Callable[[type[Mixer]], type[Mixer]]:
    """Class decorator: make a mixer available under ``name``."""

    def add(mixer: type[Mixer]) -> type[Mixer]:
        assert name not in _MIXERS, f"mixer {name} is registered twice"
        mixer.name = name
        _MIXERS[name] = mixer
        return mixer

    return add


def names() -> tuple[str, ...]:
    """Every registered mixer."""
    return tuple(sorted(_MIXERS))


def get(name: str) -> type[Mixer]:
    """The mixer registered as ``name``; ``ValueError`` with the nearest match otherwise."""
    if name not in _MIXERS:
        near = difflib.get_close_matches(name, _MIXERS, n=1)
        raise ValueError(
            f"unknown mixer {name!r}\n"
            f"  why: registered are {', '.join(names())}\n"
            f"  try: {near[0] if near else names()[0]}"
        )
    return _MIXERS[name]

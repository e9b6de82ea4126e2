"""The mixers by name: what ``--la-module`` and ``LA_MODULE`` may say."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable

from linear_moe.lsm.mixer import Mixer
from linear_moe.lsm.tables import LAYOUTS

_MIXERS: dict[str, type[Mixer]] = {}


def register(name: str) -> Callable[[type[Mixer]], type[Mixer]]:
    """Class decorator: make a mixer available under ``name``.

    Raises:
        ValueError: the name is taken, or the mixer names a layout that does not exist as unsupported.
    """

    def add(mixer: type[Mixer]) -> type[Mixer]:
        if name in _MIXERS:
            raise ValueError(
                f"mixer {name!r} is registered twice\n"
                f"  why: {_MIXERS[name].__module__} and {mixer.__module__} both have one\n"
                f"  try: another name for yours"
            )
        for layout in mixer.unsupported:
            if layout not in LAYOUTS:
                raise ValueError(
                    f"mixer {name!r} does not support {layout!r}, which is no layout\n"
                    f"  why: its `unsupported` is looked up by {', '.join(LAYOUTS)}\n"
                    f"  try: {(difflib.get_close_matches(layout, LAYOUTS, n=1) or list(LAYOUTS))[0]}"
                )
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
            f"  why: {_no_mixture(name) or f'registered are {", ".join(names())}'}\n"
            f"  try: {near[0] if near else names()[0]}"
        )
    return _MIXERS[name]


def _no_mixture(name: str) -> str | None:
    """Why there is no ``mom_`` mixture of a registered mixer; ``None`` if ``name`` asks for none."""
    from linear_moe.lsm.mom import excluded

    inner = _MIXERS.get(name.removeprefix("mom_"))
    reason = None if inner is None else excluded(inner)
    return reason and f"{name.removeprefix('mom_')} has no mixture of memories: {reason}"


def import_mixers(modules: str) -> None:
    """Import ``modules``, comma separated, so that the mixers in them are registered, and mixtures of them.

    Raises:
        ValueError: a module is not there, or fails to import.
    """
    from linear_moe.lsm.mom import add_mixtures  # mixtures are mixers, and register themselves here

    for module in filter(None, (part.strip() for part in modules.split(","))):
        try:
            importlib.import_module(module)
        except (ImportError, SyntaxError) as error:
            is_there = not isinstance(error, ModuleNotFoundError) or not f"{module}.".startswith(
                f"{error.name}."
            )
            named = f"PYTHONPATH=<the folder that holds {module.split('.')[0]}>, or correct the name"
            raise ValueError(
                f"mixer module {module!r} cannot be imported\n"
                f"  why: {error}\n"
                f"  try: {f'python -c "import {module}", which shows the line' if is_there else named}"
            ) from error
    add_mixtures()

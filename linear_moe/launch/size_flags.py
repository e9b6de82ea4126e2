"""EXTRA_ARGS that change the size of a model: `--num-layers 6` is a change of the size, not behind the checks' back."""

import shlex
from dataclasses import replace
from typing import Any

from linear_moe.launch.errors import PreflightError
from linear_moe.model.families import FRACTIONS, SIZE_FLAGS, ModelSize, size_fields, unused_fields

_MAY_BE_ZERO = ("ffn_hidden_size",)
"""No feed-forward blocks."""


def changed_size(size: ModelSize, text: str) -> tuple[ModelSize, tuple[str, ...]]:
    """The size as EXTRA_ARGS changes it, and the words of EXTRA_ARGS that do not.

    Raises PreflightError for text that cannot be split, a value that is no size, and a flag that changes nothing.
    """
    fields = {flag: name for name, flag in SIZE_FLAGS.items()}
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise PreflightError(f"EXTRA_ARGS={text} cannot be split.", f"{error}.", "close the quotes") from None
    changes: dict[str, Any] = {}
    rest: list[str] = []
    while words:
        word = words.pop(0)
        flag, _, value = word.partition("=")
        if flag not in fields:
            rest.append(word)
            continue
        changes[fields[flag]] = _number(flag, fields[flag], value or (words.pop(0) if words else ""))
    changed = replace(size, **changes)
    _check_used(size, changed, changes)
    return changed, tuple(rest)


def _number(flag: str, name: str, text: str) -> int | float:
    least = 0 if name in _MAY_BE_ZERO else 1
    try:
        number = (float if name in FRACTIONS else int)(text)
    except ValueError:
        number = -1
    if not (number > 0 or number == least):
        raise PreflightError(
            f"{flag} {text} of EXTRA_ARGS is not a positive number.",
            "it is a size of the model.",
            f"{flag} {'1e-6' if name in FRACTIONS else 8}",
        )
    return number


def _check_used(before: ModelSize, after: ModelSize, changes: dict[str, Any]) -> None:
    """Every flag means something for a model of this kind."""
    for name in changes:
        instead = "leave it out"
        if name in unused_fields(before):
            why = "it is of latent attention, which this family has not."
            if before.has_latent_attention:
                why = "with latent attention all heads share one compressed key and value."
        elif name not in size_fields(after):
            why, instead = (
                "it is of experts, which this model has not.",
                "leave it out, or --num-experts 8 with it",
            )
        else:
            continue
        raise PreflightError(
            f"EXTRA_ARGS holds {SIZE_FLAGS[name]}, which changes nothing here.", why, instead
        )

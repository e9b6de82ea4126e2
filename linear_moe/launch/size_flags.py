"""EXTRA_ARGS that change the size of a model: `--num-layers 6` is a change of the size, not behind the checks' back."""

import re
import shlex
from dataclasses import replace
from typing import Any

from linear_moe.launch.errors import PreflightError
from linear_moe.model.families import FRACTIONS, SIZE_FLAGS, ModelSize, size_fields, unused_fields

_EXPERTS_FLAG = "--moe-layer-freq"
_DENSE_FIRST = re.compile(r"\(?\[0\](?:\*(\d+))?\+\[1\](?:\*(\d+))?\)?")
"""Megatron's way to say that layers at the start have no experts: `([0]*1+[1]*26)`."""

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
    experts = None
    while words:
        word = words.pop(0)
        flag, _, value = word.partition("=")
        if flag not in fields and flag != _EXPERTS_FLAG:
            rest.append(word)
            continue
        value = value or (words.pop(0) if words else "")
        if flag == _EXPERTS_FLAG:
            experts = value
        else:
            changes[fields[flag]] = _number(flag, fields[flag], value)
    changed = replace(size, **changes)
    _check_used(size, changed, changes)
    return changed if experts is None else _with_dense_layers(changed, experts), tuple(rest)


def _with_dense_layers(size: ModelSize, text: str) -> ModelSize:
    found = _DENSE_FIRST.fullmatch(text)
    dense, others = (int(number or 1) for number in found.groups()) if found else (0, size.num_layers)
    if not size.is_moe or (found is None and text != "1") or dense + others != size.num_layers:
        last = size.num_layers - 1
        raise PreflightError(
            f"{_EXPERTS_FLAG} {text} of EXTRA_ARGS is no number of dense layers before those with experts.",
            f"a model keeps that number alone, and this one has {size.num_layers} layers, "
            f"{'with' if size.is_moe else 'without'} experts.",
            f"EXTRA_ARGS='{_EXPERTS_FLAG} ([0]*1+[1]*{last})' for one" if size.is_moe else "leave it out",
        )
    return replace(size, first_dense_layers=dense)


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

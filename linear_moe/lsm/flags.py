"""Options of a mixer as a command line has them: the fields of its Config that are not the model's to say."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any

from linear_moe.field_docs import field_docs
from linear_moe.lsm.mixer import Mixer

SHAPE_FIELDS = ("hidden_size", "num_heads", "head_dim", "layers_of_kind", "qkv_bias")
"""Fields of every mixer's Config that follow from the model."""

MODEL_FIELD = "norm_eps"
"""An option whose default in a model is the model's."""


def flag_of(mixer: str, field: str) -> str:
    """``--gla-gate-rank``."""
    return f"--{mixer}-{field}".replace("_", "-")


def options_of(config: type[Mixer.Config]) -> list[tuple[str, Callable[[str], Any], str]]:
    """Name, parser and help, with the default, of every field of a mixer's Config that a user may set."""
    hints, docs = typing.get_type_hints(config), field_docs(config)
    found = []
    for field in dataclasses.fields(config):
        if field.name in SHAPE_FIELDS:
            continue
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):
            kind = next(t for t in typing.get_args(kind) if t is not type(None))
        default = "the model's" if field.name == MODEL_FIELD else field.default
        text = f"{docs.get(field.name, '')} [{default}]".replace("``", "").strip()
        found.append((field.name, _boolean if kind is bool else kind, text))
    return found


def _boolean(text: str | bool) -> bool:
    if str(text).lower() not in ("true", "false"):
        raise ValueError(f"expected true or false, got {text!r}")
    return str(text).lower() == "true"

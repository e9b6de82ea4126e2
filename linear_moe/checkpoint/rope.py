"""Rotary positions of a config.json and ours, in both directions. Imports neither torch nor Megatron.

Older files have ``rope_theta`` and ``rope_scaling``, newer ones ``rope_parameters``; where a file has several, or lacks
some, they mean what transformers takes them for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from linear_moe.model.families import Llama3Rope, ModelSize, YarnRope

LLAMA3_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN_FIXED = {"original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
"""What all models of a family have, and Megatron has no flags for."""

DEFAULT_BASE = {"mixtral": 1_000_000.0}
"""Where a file has none, by ``model_type``; 10,000 in others."""

_ORIGINAL = "original_max_position_embeddings"


def rope_of(kind: str, part: float, config: Mapping[str, Any]) -> tuple[int, Llama3Rope | YarnRope | None]:
    """Base and stretching.

    Args:
        kind: ``model_type``.
        part: of the channels that its family turns.
        config: of the file.

    Raises:
        ValueError: positions that our layers do not have.
    """
    given = _given(kind, part, config)
    base, rope_type = given["rope_theta"], given["rope_type"]
    nested = any(isinstance(value, Mapping) for value in given.values())
    if base == int(base) and given["partial_rotary_factor"] == part and not nested:
        if rope_type == "default":
            return int(base), None
        if rope_type == "llama3" and kind == "llama" and _holds(given, LLAMA3_FIXED):
            return int(base), Llama3Rope(factor=float(given["factor"]))
        plain = "attention_factor" not in given and given.get("truncate", True)
        if rope_type == "yarn" and kind == "deepseek_v2" and plain and _holds(given, YARN_FIXED):
            names = ("factor", "mscale", "mscale_all_dim")
            if all(given.get(name) for name in names):
                return int(base), YarnRope(**{name: float(given[name]) for name in names})
    raise ValueError(
        f"config.json has rotary positions of type {rope_type}, in a part {given['partial_rotary_factor']} of the "
        f"channels: {given}\n"
        f"  why: here their base is a whole number, and they are plain (in a part {part} of the channels, for {kind}), "
        f"or stretched as Llama 3 does (llama, {LLAMA3_FIXED}) or by YaRN (deepseek_v2, {YARN_FIXED}, with mscale and "
        f"mscale_all_dim)\n"
        f"  try: remove the stretching, if sequences stay below the original length"
    )


def _given(kind: str, part: float, config: Mapping[str, Any]) -> dict[str, Any]:
    """All of it in one, with what an absent field means."""
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    given = {name: value for name, value in found.items() if value is not None}
    given.setdefault("rope_type", given.get("type", "default"))
    given.setdefault("rope_theta", config.get("rope_theta") or DEFAULT_BASE.get(kind, 10_000.0))
    given.setdefault("partial_rotary_factor", config.get("partial_rotary_factor", part))
    if given["rope_type"] != "default":
        given.setdefault(_ORIGINAL, config.get("max_position_embeddings"))
        given[_ORIGINAL] = config.get(_ORIGINAL, given[_ORIGINAL])
    return given


def _holds(given: Mapping[str, Any], fixed: Mapping[str, float]) -> bool:
    return all(given.get(name, value) == value for name, value in fixed.items())


def rope_parameters(size: ModelSize) -> dict[str, Any]:
    """The other way: the field of the same name."""
    base, scaling = {"rope_theta": float(size.rotary_base)}, size.rope_scaling
    if isinstance(scaling, Llama3Rope):
        return base | {"rope_type": "llama3", "factor": scaling.factor} | LLAMA3_FIXED
    if isinstance(scaling, YarnRope):
        return base | {"rope_type": "yarn"} | vars(scaling) | YARN_FIXED
    return base | {"rope_type": "default"}

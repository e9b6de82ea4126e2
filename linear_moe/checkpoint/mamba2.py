"""The layers of a Mamba2 config.json and ours, in both directions. Imports neither torch nor Megatron.

Every layer is a norm and a Mamba2 mixer; there is no feed-forward block. ``time_step_min``, ``time_step_max``,
``time_step_floor`` and ``rescale_prenorm_residual`` say how a training starts and ``chunk_size`` how transformers
computes: none is part of the function. Nor is ``norm_before_gate``, which transformers does not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linear_moe.lsm.mamba2 import Mamba2

MIXER = "mamba2"

DEFAULTS: dict[str, Any] = {
    "num_heads": 128,
    "head_dim": 64,
    "state_size": 128,
    "expand": 2,
    "n_groups": 8,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "time_step_limit": (0.0, math.inf),
    "residual_in_fp32": True,
}
"""What an absent field means."""

_WIDEST = 256
"""Channels of a head, and of a state, that our kernels take."""


def layers_of(config: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mixer of every layer, and its options as flags.

    Raises:
        ValueError: a value that our mixer does not have.
    """
    found = _fields(config)
    _check(found, config["hidden_size"])
    limits = _limits(found["time_step_limit"])
    assert limits is not None
    low, high = limits
    options = {
        "expand": float(found["expand"]),
        "ssm-head-dim": found["head_dim"],
        "state-size": found["state_size"],
        "num-groups": found["n_groups"],
        "conv-size": found["conv_kernel"],
        "conv-bias": str(bool(found["use_conv_bias"])).lower(),
        "dt-limit-min": low,
    }
    options |= {"dt-limit-max": high} if high < math.inf else {}
    flags = [word for name, value in options.items() for word in (f"--mamba2-{name}", str(value))]
    return (MIXER,) * config["num_hidden_layers"], tuple(flags)


def size_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of our size that the config has none for: no feed-forward block, softmax heads as wide as the stream."""
    found = _fields(config)
    _check(found, config["hidden_size"])
    common = math.gcd(found["num_heads"], found["expand"])
    heads = found["num_heads"] // common
    return {
        "ffn_hidden_size": 0,
        "num_attention_heads": heads,
        "num_query_groups": heads,
        "kv_channels": config["hidden_size"] // heads,
        "fp32_residual": bool(found["residual_in_fp32"]),
        "max_position_embeddings": 1_048_576,
    }


def warnings_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a reader of the config may take for something else than it is."""
    if not config.get("norm_before_gate"):
        return ()
    return ("norm_before_gate = true is ignored, as transformers does: the norm comes behind the gate",)


def fields_of(mixer: Mamba2.Config) -> dict[str, Any] | None:
    """The other way: the fields of the layers; None where the class has no such layers."""
    channels = mixer.num_heads * mixer.head_v_dim
    plain = mixer.output_norm == "rmsnorm" and mixer.output_gate == "swish" and not mixer.qkv_bias
    if not plain or mixer.conv_size == 0 or channels % mixer.hidden_size:
        return None
    high: Any = {"__float__": "Infinity"} if mixer.dt_limit_max is None else mixer.dt_limit_max
    return {
        "num_heads": mixer.num_heads,
        "head_dim": mixer.head_v_dim,
        "state_size": mixer.head_k_dim,
        "expand": channels // mixer.hidden_size,
        "n_groups": mixer.num_groups,
        "conv_kernel": mixer.conv_size,
        "use_conv_bias": mixer.conv_bias,
        "time_step_limit": [mixer.dt_limit_min, high],
    }


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: config.get(name) for name in DEFAULTS}
    return {name: DEFAULTS[name] if value is None else value for name, value in given.items()}


def _check(found: Mapping[str, Any], hidden: int) -> None:
    heads, width, groups = found["num_heads"], found["head_dim"], found["n_groups"]
    checks = {
        f"expand = {found['expand']!r}": (
            found["expand"] in range(1, 1 + hidden) and found["expand"] * hidden == heads * width,
            f"expand x hidden_size = {found['expand']!r} x {hidden} are the channels of num_heads x head_dim = "
            f"{heads} x {width}",
            "the config.json that belongs to the weights",
        ),
        f"n_groups = {groups!r}": (
            groups in range(1, 1 + heads) and heads % groups == 0,
            f"every group has the same number of the {heads} heads",
            "the config.json that belongs to the weights",
        ),
        f"conv_kernel = {found['conv_kernel']!r}": (
            found["conv_kernel"] > 1,
            "it counts the tokens that our short convolution sees, the last one and some before it",
            "a model with conv_kernel 2 or more",
        ),
        **{
            f"{name} = {found[name]!r}": (
                0 < found[name] <= _WIDEST,
                f"our kernels take keys and values of up to {_WIDEST} channels",
                "a model with narrower heads",
            )
            for name in ("head_dim", "state_size")
        },
        f"time_step_limit = {found['time_step_limit']!r}": (
            _limits(found["time_step_limit"]) is not None,
            "a step is clamped between two numbers, the first 0 or more and below the second",
            "[0.0, Infinity], which clamps nothing",
        ),
    }
    for what, (holds, why, instead) in checks.items():
        if not holds:
            raise ValueError(f"config.json has {what}\n  why: {why}\n  try: {instead}")


def _limits(given: Any) -> tuple[float, float] | None:
    """Both ends, if they are; infinity as transformers writes it, or as Python does."""
    if not isinstance(given, list | tuple) or len(given) != 2:
        return None
    low, high = (float(x["__float__"] if isinstance(x, dict) else x) for x in given)
    return (low, high) if 0 <= low < high else None

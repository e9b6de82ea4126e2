"""Linear sequence modelling: one file per token mixer, each a recurrence over a matrix memory per head."""

from linear_moe.lsm import (
    based,
    delta_net,
    gated_delta_net,
    gla,
    gsa,
    hgrn2,
    kda,
    lightning_attention,
    linear_attention,
    mamba2,
    rebased,
    retention,
    rwkv6,
    rwkv7,
)
from linear_moe.lsm.mixer import Mixer, MixerState, Parameter, Placement, Projection
from linear_moe.lsm.mom import add_mixtures
from linear_moe.lsm.registry import get, names, register

add_mixtures()

__all__ = [
    "Mixer",
    "MixerState",
    "Parameter",
    "Placement",
    "Projection",
    "add_mixtures",
    "based",
    "delta_net",
    "gated_delta_net",
    "get",
    "gla",
    "gsa",
    "hgrn2",
    "kda",
    "lightning_attention",
    "linear_attention",
    "mamba2",
    "names",
    "rebased",
    "register",
    "retention",
    "rwkv6",
    "rwkv7",
]

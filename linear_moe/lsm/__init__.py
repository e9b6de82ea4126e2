"""Linear sequence modelling: one file per token mixer, each a recurrence over a matrix memory per head."""

from linear_moe.lsm import (
    based,
    delta_net,
    gated_delta_net,
    gla,
    kda,
    lightning_attention,
    linear_attention,
    rebased,
)
from linear_moe.lsm.mixer import Mixer, MixerState, Parameter, Placement, Projection
from linear_moe.lsm.registry import get, names, register

__all__ = [
    "Mixer",
    "MixerState",
    "Parameter",
    "Placement",
    "Projection",
    "based",
    "delta_net",
    "gated_delta_net",
    "get",
    "gla",
    "kda",
    "lightning_attention",
    "linear_attention",
    "names",
    "rebased",
    "register",
]

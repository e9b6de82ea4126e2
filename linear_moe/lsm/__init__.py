"""Linear sequence modelling: one file per token mixer, each a recurrence over a matrix memory per head."""

from linear_moe.lsm import gated_delta_net, gla, linear_attention
from linear_moe.lsm.mixer import Mixer, MixerState, Parameter, Placement, Projection
from linear_moe.lsm.registry import get, names, register

__all__ = [
    "Mixer",
    "MixerState",
    "Parameter",
    "Placement",
    "Projection",
    "gated_delta_net",
    "get",
    "gla",
    "linear_attention",
    "names",
    "register",
]

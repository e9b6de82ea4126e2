"""The norm and the gate of a mixer's output, per head or over groups of heads, also when ranks share a group.

Letters: B rows, T tokens, H heads here, G groups of heads of the whole layer, V value dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.kernels import gated_group_norm, gated_rms_norm, skip_gate_norm
from linear_moe.lsm.tables import Placement, widen

if TYPE_CHECKING:
    from linear_moe.lsm.mixer import Mixer


def read_out(
    o_BTHV: Tensor,
    g_BTHV: Tensor | None,
    w: dict[str, Tensor],
    cfg: Mixer.Config,
    num_groups: int,
    place: Placement,
) -> Tensor:
    """Norm, then gate, ``[B, T, H, V]`` in o's dtype; one kernel for both where every head has its own statistics.

    And one for a norm over heads that are all here, if no gate follows.
    """
    gated = None if cfg.output_gate == "none" else g_BTHV
    activation = "sigmoid" if cfg.output_gate == "sigmoid" else "swish"
    if cfg.output_norm == "rmsnorm" and num_groups == cfg.num_heads:
        return gated_rms_norm(o_BTHV, w["norm_weight"], gated, activation=activation, eps=cfg.norm_eps)
    per_group = cfg.num_heads // num_groups
    if cfg.output_norm == "rmsnorm" and cfg.output_gate == "none" and place.num_heads % per_group == 0:
        groups = place.num_heads // per_group
        return skip_gate_norm(o_BTHV, None, None, w["norm_weight"], num_groups=groups, eps=cfg.norm_eps)
    if cfg.output_norm == "groupnorm":
        assert num_groups == cfg.num_heads, "a mean over heads of several ranks is not needed by any mixer"
        weight, bias = (w[name].expand(o_BTHV.shape[2:]) for name in ("norm_weight", "norm_bias"))
        return gated_group_norm(o_BTHV, weight, bias, gated, activation=activation, eps=cfg.norm_eps)
    wide = norm(o_BTHV, w, cfg, num_groups, place)
    return gate(wide, g_BTHV, cfg.output_gate).to(o_BTHV.dtype)


def norm(
    o_BTHV: Tensor,
    w: dict[str, Tensor],
    cfg: Mixer.Config,
    num_groups: int,
    place: Placement,
    *,
    eps: float | None = None,
) -> Tensor:
    """RMS or group norm by ``cfg.output_norm``, in float32 at least; ``eps`` instead of ``cfg.norm_eps``."""
    eps = cfg.norm_eps if eps is None else eps
    if cfg.output_norm == "identity":
        return o_BTHV
    wide = widen(o_BTHV)
    weight = widen(w["norm_weight"])
    if cfg.output_norm == "groupnorm":
        assert num_groups == cfg.num_heads, "a mean over heads of several ranks is not needed by any mixer"
        wide = F.layer_norm(wide, (wide.shape[-1],), eps=eps) * weight + widen(w["norm_bias"])
    elif num_groups == cfg.num_heads and weight.ndim == 1:
        wide = F.rms_norm(wide, (wide.shape[-1],), weight, eps)
    else:
        wide = wide * _inverse_rms(wide, cfg, num_groups, place, eps) * weight
    return wide


def gate(o_BTHV: Tensor, g_BTHV: Tensor | None, activation: str) -> Tensor:
    """Multiply with the activated gate; ``none`` leaves the output alone."""
    if activation == "none":
        return o_BTHV
    assert g_BTHV is not None
    act = F.silu if activation == "swish" else torch.sigmoid
    return o_BTHV * act(g_BTHV.to(o_BTHV.dtype))


def _inverse_rms(wide: Tensor, cfg: Mixer.Config, num_groups: int, place: Placement, eps: float) -> Tensor:
    """Of each head's group, ``[B, T, H, 1]``; groups are of the whole layer, so ranks may add to the same one."""
    heads = torch.arange(place.first_head, place.first_head + place.num_heads, device=wide.device)
    group_H = heads // (cfg.num_heads // num_groups)
    squares_BTG = wide.new_zeros(*wide.shape[:2], num_groups)
    squares_BTG = squares_BTG.index_add(2, group_H, wide.square().sum(-1))
    if num_groups % (cfg.num_heads // place.num_heads):  # some group lives on several ranks
        squares_BTG = place.sum_over_ranks(squares_BTG)
    mean_BTG = squares_BTG / (cfg.num_heads // num_groups * wide.shape[-1])
    return torch.rsqrt(mean_BTG + eps).index_select(2, group_H).unsqueeze(-1)

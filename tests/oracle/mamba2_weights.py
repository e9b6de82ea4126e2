"""Mamba2's weights have the same names and layout in mamba_ssm, transformers and flash-linear-attention.

``in_proj`` holds the rows of z, x, B, C and dt, each for all heads or groups; one convolution runs over x, B and C.
"""

from __future__ import annotations

import torch
from torch import nn

from tests.oracle.exchange import Weights, heads


def mamba2_weights(layer: nn.Module, num_heads: int, num_groups: int, state_size: int) -> Weights:
    """Ours."""
    width, grouped = layer.out_proj.weight.shape[1], num_groups * state_size
    z, x, b, c, dt = layer.in_proj.weight.split([width, width, grouped, grouped, num_heads])
    conv_parts = layer.conv1d.weight.squeeze(1).split([width, grouped, grouped])
    bias_parts = layer.conv1d.bias.split([width, grouped, grouped])
    return {
        "g": z,
        "x": x,
        "b": b,
        "c": c,
        "dt": dt,
        "conv_weight": heads(conv_parts[0], num_heads),
        "conv_bias": heads(bias_parts[0], num_heads),
        "group_conv_weight": torch.cat([heads(part, num_groups) for part in conv_parts[1:]], dim=1),
        "group_conv_bias": torch.cat([heads(part, num_groups) for part in bias_parts[1:]], dim=1),
        "A_log": layer.A_log,
        "dt_bias": layer.dt_bias,
        "D": layer.D,
        "norm_weight": heads(layer.norm.weight, num_heads),
        "out": layer.out_proj.weight,
    }

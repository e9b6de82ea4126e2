"""Rotary positions (arXiv:2104.09864): pairs of channels of queries and keys, turned by the angles of their token.

    y_i = scale (x_i cos a_i - x_{i+R} sin a_i)      y_{i+R} = scale (x_{i+R} cos a_i + x_i sin a_i)      for i < R

Channels from 2 R on are copied. The gradient is turned by the opposite angles: of the inputs only these are kept.

Letters: B batch, T tokens, H query heads, G key heads, K width of a head, R angles of a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linear_moe.kernels.once import once_differentiable


def rotate_heads(q: Tensor, k: Tensor, angles: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """See :func:`linear_moe.kernels.rotate_heads`."""
    return _Rotate.apply(q, k, angles, scale)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, angles: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(angles)
        ctx.scale = scale
        return _turned(q, angles, scale), _turned(k, angles, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (angles,) = ctx.saved_tensors
        return _turned(grads[0], -angles, ctx.scale), _turned(grads[1], -angles, ctx.scale), None, None


def _turned(x: Tensor, angles: Tensor, scale: float) -> Tensor:
    dtype, num_angles = torch.promote_types(x.dtype, torch.float32), angles.shape[-1]
    angles = angles.to(torch.promote_types(angles.dtype, dtype)).unsqueeze(2)
    cos, sin = angles.cos().to(dtype) * scale, angles.sin().to(dtype) * scale
    first, second, rest = x.to(dtype).split([num_angles, num_angles, x.shape[-1] - 2 * num_angles], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)

"""Normalisation layers without Transformer Engine that work under sequence parallelism.

    RMSNorm    y = x / sqrt(mean(x^2) + eps) * weight
    LayerNorm  y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

Statistics are float32 whatever the dtype of ``x`` (PyTorch does that), and y has the dtype of ``x``; that of the
weight when ``x`` is a float32 residual stream (``config.fp32_residual_connection``). Under sequence parallelism every
tensor-parallel rank normalises other tokens, so a weight gradient is a partial sum per rank: ``sequence_parallel`` on
the parameter makes Megatron's ``finalize_model_grads`` add them up.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from linear_moe.kernels import rms_norm


class RMSNorm(torch.nn.Module):
    """RMSNorm over the last dimension, ``[..., hidden_size]``; built as Megatron builds norms.

    ``weight`` ``[hidden_size]``, held as an offset from 1 when ``config.layernorm_zero_centered_gamma``.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.narrows = config.fp32_residual_connection
        self.weight = _parameter(config, hidden_size, 0.0 if self.zero_centered else 1.0)

    def forward(self, x: Tensor) -> Any:
        """Normalise ``x``."""
        return self._normed(x)[0]

    def _normed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight: Tensor = self.weight
        if self.zero_centered:
            # In half precision 1 + weight would be 1 for offsets that matter over a whole model.
            weight = 1.0 + weight.to(torch.promote_types(x.dtype, torch.float32))
        y, passed = rms_norm(x.reshape(1, -1, x.shape[-1]), weight, eps=self.eps)
        return y.view(x.shape).to(self.weight.dtype if self.narrows else x.dtype), passed.view(x.shape)


class ResidualRMSNorm(RMSNorm):
    """The norm at the start of a residual branch; gives ``x`` too, which Megatron's layer adds to what comes out of it.

    The gradients of the two are added in one pass. Kept apart: recomputed on its own, a norm must not give its input.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise ``x``, and pass it on."""
        return self._normed(x)


class LayerNorm(torch.nn.Module):
    """LayerNorm over the last dimension, ``[..., hidden_size]``; built as Megatron builds norms."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.narrows = config.fp32_residual_connection
        self.weight = _parameter(config, hidden_size, 0.0 if self.zero_centered else 1.0)
        self.bias = _parameter(config, hidden_size, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x``."""
        weight = self.weight + 1.0 if self.zero_centered else self.weight
        y = F.layer_norm(x, weight.shape, weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return y.to(self.weight.dtype) if self.narrows else y


def _parameter(config: TransformerConfig, size: int, value: float) -> torch.nn.Parameter:
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    data = torch.full((size,), value, dtype=config.params_dtype, device=device)
    parameter = torch.nn.Parameter(data)
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter

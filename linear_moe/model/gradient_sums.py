"""Where Megatron sums a parameter's gradients over a step, and who has written there.

A step begins with the sums of the last one (``linear_moe.training.optimizer_step``): what comes first overwrites them,
and the rest is added. Usually that is done by the hook of a parameter, with a gradient in the parameter's dtype. A
product that writes the float32 sum itself tells the hook, which then adds nothing to it, and reduces gradients as ever.
Products of experts do so where a fused kernel does it faster, or with ``--expert-gradients-in-place`` everywhere.
"""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from linear_moe.kernels.gradients import has_fast_weight_grad
from linear_moe.kernels.grouped_linear import Sums

STALE = "main_grad_is_stale"
"""Attribute of parameters with a hook of ours: whether ``main_grad`` is still the sum of an earlier step."""

WRITTEN = "main_grad_has_gradient"
"""Attribute of those: whether the gradient that autograd brings next is in ``main_grad`` already."""


def sums_of(weight: Tensor, config: TransformerConfig) -> Sums | None:
    """What products with ``weight`` that are computed now ask in their backward pass; the one place that decides.

    Not where Megatron captures graphs of the backward pass: whether to add changes from step to step.
    """
    in_place = getattr(config, "expert_gradients_in_place", False)
    if in_place is False or config.cuda_graph_impl != "none":
        return None
    return partial(claim, weight, only_fast=in_place is None)


def claim(
    weight: Tensor, dy: Tensor, x: Tensor, ends: Tensor, *, only_fast: bool
) -> tuple[Tensor, bool] | None:
    """The sum of the weight's gradients and whether to add to it, for who then writes there; ``None``: nobody may.

    Only a parameter whose hook is ours: a stock one would add what autograd brings, too.

    Args:
        weight: ``[E, O, I]``, the parameter.
        dy: ``[M, O]``, gradients of outputs.
        x: ``[M, I]``, the inputs.
        ends: ``[E]``, where each expert's tokens end.
        only_fast: not for torch's product, which is written, read and added either way.
    """
    total = getattr(weight, "main_grad", None)
    is_ours = weight.is_leaf and hasattr(weight, STALE) and not getattr(weight, "zero_out_wgrad", False)
    if not is_ours or total is None or total.dtype != torch.float32 or not total.is_contiguous():
        return None
    add = not getattr(weight, STALE)
    if only_fast and not getattr(weight, WRITTEN) and not has_fast_weight_grad(total, dy, x, ends, add):
        return None  # but not after another use of the weight: its gradient would be all that the hook sees
    setattr(weight, STALE, False)
    setattr(weight, WRITTEN, True)
    return total, add

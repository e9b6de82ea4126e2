"""The public kernel of experts' gradients: arguments checked, then handed to the backend that is picked, as in ``ops``.

Letters: M tokens, E experts, O and I sizes of outputs and inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linear_moe.kernels import checks, dispatch


def grouped_weight_grad_(total: Tensor, dy: Tensor, x: Tensor, ends: Tensor, add: bool) -> None:
    """Gradients of experts' weights into their sums: ``total[e] (+)= dy[rows of e]^T x[rows of e]``.

    Products are added up in the dtype of ``total`` (``kernels/weight_grad.py`` says where not), in the same order in
    every run. Nothing is differentiable.

    Args:
        total: ``[E, O, I]``, float32 (float64 for float64 operands), overwritten.
        dy: ``[M, O]``, gradients of outputs sorted by expert, any float dtype.
        x: ``[M, I]``, the inputs, of the same dtype.
        ends: ``[E]`` int32 on their device: where each expert's tokens end. Tokens behind the last end are nobody's.
        add: to what is in ``total``; else that is overwritten, by zeros for an expert without tokens.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    checks.check_weight_grad(total, dy, x, ends)
    with torch.no_grad():
        dispatch.run("grouped_weight_grad_", dy, total, dy, x, ends, add)


def has_fast_weight_grad(total: Tensor, dy: Tensor, x: Tensor, ends: Tensor, add: bool) -> bool:
    """Whether :func:`grouped_weight_grad_` of these beats a product whose result is read and added.

    Where a fused kernel runs, which is timed on Hopper only: on other GPUs its tiles are small. Nobody is told that
    none does, or that there was no memory to try it: the next call is asked again.
    """
    if total.is_cuda and torch.cuda.get_device_capability(total.device)[0] != 9:
        return False
    try:
        with torch.no_grad():
            return dispatch.fused("grouped_weight_grad_", total, dy, x, ends, add) is not None
    except torch.OutOfMemoryError:  # of weights that may be large, in float64
        torch.cuda.empty_cache()
        return False

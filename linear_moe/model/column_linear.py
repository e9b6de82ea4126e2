"""Megatron's column-parallel linear layer, whose product adds the bias.

Letters: T tokens, B batch, C channels in, D channels out.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor


class ColumnLinear(ColumnParallelLinear):
    """The same on one tensor-parallel rank, but the bias takes no pass over the output, ``[T, B, D]``.

    Megatron adds it afterwards, and rounds twice. Where ranks share the layer, or the product adds to the gradient of
    the weight in place, it is Megatron's.
    """

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bias = kwargs.get("bias")
        is_plain = (
            self.tp_group.size() == 1 and not self.gradient_accumulation_fusion and self.gtp_remat_size == 1
        )
        if bias is None or not is_plain:
            out: Tensor = super()._forward_impl(input, weight, *args, **kwargs)
            return out
        return F.linear(input, weight, bias)

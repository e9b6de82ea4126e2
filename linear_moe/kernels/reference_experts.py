"""The definition of the kernel in ``gradients``, as those in ``reference``: one token after the other.

Letters: as in ``gradients``.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def grouped_weight_grad_(total: Tensor, dy: Tensor, x: Tensor, ends: Tensor, add: bool) -> None:
    """A product of two vectors for each token."""
    if not add:
        total.zero_()
    begin = 0
    for sum_e, end in zip(total, ends.tolist(), strict=True):
        for dy_m, x_m in zip(dy[begin:end], x[begin:end]):
            sum_e += dy_m.to(total.dtype)[:, None] * x_m.to(total.dtype)
        begin = end

"""What a run of tokens does to any memory, and how two runs compose.

Every recurrence family is affine in the memory ``S`` (``K x V`` per head), so a run of tokens is the pair
(decay, state):

    diagonal   S_out = exp(log_decay) * S_in + state      log_decay broadcasts against [N, H, K, V]
    dense      S_out = decay @ S_in + state               decay [N, H, K, K]: both delta rules

Composition is associative; LASP-2 (arXiv:2502.07563) needs nothing else.

Letters: N runs, H heads here, K key dim, V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linear_moe.kernels.autocast import without_autocast


@dataclass(frozen=True)
class Segment:
    """The affine action of a run of tokens on a memory.

    Attributes:
        state: ``[N, H, K, V]``, the memory after the run when it started empty. float32, or float64.
        log_decay: natural log of the diagonal decay, ``<= 0``, shape ``[N, H, K | 1, V | 1]``; ``-inf`` forgets
            everything. ``None`` with ``decay`` set; ``None`` without it means the identity.
        decay: dense decay ``[N, H, K, K]``, or ``None``.
    """

    state: Tensor
    log_decay: Tensor | None = None
    decay: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.log_decay is None or self.decay is None, "a segment is diagonal or dense, not both"

    def carry(self, state: Tensor) -> Tensor:
        """The memory after this run, given the one before it: ``[N, H, K, V]`` to ``[N, H, K, V]``."""
        if self.decay is not None:
            return _product(self.decay, state) + self.state
        if self.log_decay is not None:
            return self.log_decay.exp() * state + self.state
        return state + self.state

    def then(self, later: Segment) -> Segment:
        """This run followed by ``later``, as one segment."""
        state = later.carry(self.state)
        if later.decay is not None:
            assert self.decay is not None, "cannot compose a diagonal with a dense segment"
            return Segment(state, decay=_product(later.decay, self.decay))
        if later.log_decay is None or self.log_decay is None:
            both = later.log_decay if self.log_decay is None else self.log_decay
            return Segment(state, log_decay=both)
        return Segment(state, log_decay=self.log_decay + later.log_decay)

    def forgetting(self, forget: Tensor) -> Segment:
        """The same run with a memory reset before it wherever ``forget`` (``[N]`` bool) is true."""
        forget_NHKV = forget[:, None, None, None]
        if self.decay is not None:
            return Segment(self.state, decay=self.decay.masked_fill(forget_NHKV, 0.0))
        log_decay = self.log_decay
        if log_decay is None:
            log_decay = torch.zeros_like(self.state[:, :, :1, :1])
        return Segment(self.state, log_decay=log_decay.masked_fill(forget_NHKV, float("-inf")))


def _product(a: Tensor, b: Tensor) -> Tensor:
    with without_autocast(a.device):
        return a @ b

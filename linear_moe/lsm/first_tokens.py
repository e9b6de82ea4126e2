"""The first tokens of every run, as rows of their own, and back in their places.

Letters: B rows, T tokens of a row, N runs, C first tokens of a run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FirstTokens:
    """Where they are. Shapes follow from the number of runs; nothing waits for the device."""

    count: int
    """C. A shorter run is filled up with tokens of other runs, whose results are dropped."""
    places: Tensor | None
    """``[N * C]``, in the row that holds all runs; T where a run has no such token. ``None``: runs are rows."""

    @classmethod
    def of(cls, num_tokens: int, cu_seqlens: Tensor | None, count: int) -> FirstTokens:
        """The first ``count`` tokens of the runs of ``num_tokens`` tokens, or of the rows."""
        count = min(count, num_tokens)
        if cu_seqlens is None:
            return cls(count, None)
        ends = cu_seqlens.long()[:, None]
        places = ends[:-1] + torch.arange(count, device=ends.device)
        return cls(count, torch.where(places < ends[1:], places, num_tokens).flatten())

    def of_each(self, x_BT: Tensor) -> Tensor:
        """``[B, T, ...]`` to ``[N, C, ...]``."""
        if self.places is None:
            return x_BT[:, : self.count]
        # A run without such a token takes any other, to which it adds a gradient of 0: the order of atomics is all one.
        rows = x_BT[0].index_select(0, self.places.clamp(max=x_BT.shape[1] - 1))
        return rows.unflatten(0, (-1, self.count))

    def replaced(self, x_BT: Tensor, first_NC: Tensor) -> Tensor:
        """``[B, T, ...]`` with ``[N, C, ...]`` in these places; the dtype of the first stays."""
        first_NC = first_NC.to(x_BT.dtype)
        if self.places is None:
            return torch.cat([first_NC, x_BT[:, self.count :]], dim=1)
        nowhere = x_BT[0, :1]
        padded = torch.cat([x_BT[0], nowhere]).index_copy_(0, self.places, first_NC.flatten(0, 1))
        return padded[:-1].unsqueeze(0)

"""Padding of a batch: mixers read the real tokens only, packed one row after another, so that no pad touches them.

Rows that hold several documents, told by positions that start again, are packed in the same way: each is read alone.

Letters: N documents, B rows, T columns, S real tokens of all rows, D any channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Padding:
    """Where the real tokens of a padded batch are.

    Attributes:
        index: ``[S]`` int64, their places in the flattened batch.
        cu_seqlens: ``[B + 1]`` int64, where each row's tokens start and end among them; or ``[N + 1]``, documents.
        shape: B and T.
    """

    index: Tensor
    cu_seqlens: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, attention_mask: Tensor | None, batch: int, columns: int) -> Padding | None:
        """From a mask ``[B, past + T]`` that is 0 at padding; ``None`` where there is none.

        Raises:
            ValueError: a mask of another shape.
        """
        if attention_mask is None:
            return None
        if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < columns:
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)} for {batch} rows of {columns} new tokens\n"
                "  why: it says which columns are padding, those read before included; linear layers know no other\n"
                "  try: the attention_mask of the tokenizer"
            )
        is_real_BT = attention_mask[:, attention_mask.shape[1] - columns :].bool()
        if bool(is_real_BT.all()):
            return None
        cu_seqlens = F.pad(is_real_BT.sum(1).cumsum(0), (1, 0))
        return cls(is_real_BT.flatten().nonzero().squeeze(1), cu_seqlens, (batch, columns))

    @classmethod
    def of_documents(cls, position_ids: Tensor, batch: int) -> Padding | None:
        """From positions ``[B, T]`` or ``[1, T]`` that start again at each document; ``None``: one in each row."""
        position_BT = position_ids.expand(batch, -1)
        goes_on_BT = position_BT.diff(dim=1) == 1
        if bool(goes_on_BT.all()):
            return None
        starts_N = F.pad(~goes_on_BT, (1, 0), value=True).flatten().nonzero().squeeze(1)
        index = torch.arange(position_BT.numel(), device=position_ids.device)
        cu_seqlens = F.pad(starts_N, (0, 1), value=len(index))
        return cls(index, cu_seqlens, (batch, position_BT.shape[1]))

    def to(self, device: torch.device, **options: Any) -> Padding:
        """On another device, where a model's layers are on several (accelerate calls this)."""
        return Padding(self.index.to(device), self.cu_seqlens.to(device), self.shape)

    def pack(self, x_BTD: Tensor) -> Tensor:
        """``[B, T, ...]`` to ``[1, S, ...]``."""
        return x_BTD.flatten(0, 1).index_select(0, self.index)[None]

    def unpack(self, x_1SD: Tensor) -> Tensor:
        """The inverse, zero at padding."""
        batch, columns = self.shape
        flat = x_1SD.new_zeros(batch * columns, *x_1SD.shape[2:])
        return flat.index_copy(0, self.index, x_1SD[0]).unflatten(0, (batch, columns))


def positions(
    attention_mask: Tensor | None, batch: int, columns: int, past: int, device: torch.device
) -> Tensor:
    """Place of each new token among the real ones of its row, ``[B, T]`` or ``[1, T]`` int64."""
    if attention_mask is None or attention_mask.ndim != 2:
        return (past + torch.arange(columns, device=device))[None]
    place = attention_mask.long().cumsum(-1) - 1
    return place[:, place.shape[1] - columns :].clamp(min=0)

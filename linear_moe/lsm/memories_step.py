"""One token of every row through a mixture of memories, for decoding: each memory of each row is a row of its own.

A memory that a row's token did not choose reads some other token, and the result is thrown away. So every shape follows
from the number of rows, and all memories step at once; a scan over packed documents would take them one after another.

Letters: N rows, E routed memories, F memories with the shared one, R = F * N, k memories per token, H heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linear_moe.lsm.memories import Copies
from linear_moe.lsm.routing import Slots
from linear_moe.lsm.tables import MixerState, Placement

if TYPE_CHECKING:
    from linear_moe.lsm.mom import MixtureOfMemories


def recall(
    mixture: MixtureOfMemories,
    x: Tensor,
    packed: dict[str, Tensor],
    others: dict[str, Tensor],
    w: dict[str, Tensor],
    place: Placement,
    slots: Slots,
    copies: Copies,
    before: MixerState,
) -> tuple[Tensor, MixerState]:
    """``[N, H, V]``, the weighted sum over memories, and their states.

    Args:
        mixture: whose memories these are.
        x: fused projections ``[1, N + N * k, H, W]``, all tokens first if there is a shared memory, then the slots.
        packed: the others by name, in the same way.
        others: the routing, as in ``recall`` of the mixture.
        w: parameters by name.
        place: the heads and the layer.
        slots: of one token per row.
        copies: F and N.
        before: states, memory by memory.
    """
    rows = copies.num_runs
    first = copies.count - slots.num_memories  # 1 with a shared memory
    row_N = torch.arange(rows, device=slots.order.device)
    slot_R = slots.cu_seqlens[:-1].clamp(max=slots.order.shape[0] - 1) + first * rows
    is_read_R = slots.cu_seqlens.diff() > 0
    if first:
        slot_R = torch.cat([row_N, slot_R])
        is_read_R = torch.cat([torch.ones_like(row_N, dtype=torch.bool), is_read_R])
    chosen = {name: found[0].index_select(0, slot_R).unsqueeze(1) for name, found in packed.items()}
    x_R1HW = x[0].index_select(0, slot_R).unsqueeze(1)
    state = copies.split(before)
    o_R1HV, _, after = mixture.core.recall(x_R1HW, chosen, w, place, state=state)
    memory = state.memory or tuple(map(torch.zeros_like, after.memory))
    kept = MixerState(
        tuple(_where(is_read_R, new, old) for new, old in zip(after.memory, memory, strict=True)),
        None if after.conv is None else _where(is_read_R, after.conv, state.conv),
    )
    o_FNHV = o_R1HV[:, 0].unflatten(0, (copies.count, rows))
    weight_NkHV = others["memory_weight"][:, 0].to(o_FNHV.dtype)[..., None, None]
    total = (o_FNHV[first + others["memory_index"][:, 0], row_N[:, None]] * weight_NkHV).sum(1)
    return (total + o_FNHV[0] if first else total), kept


def _where(is_read_R: Tensor, new: Tensor, old: Tensor | None) -> Tensor:
    old = torch.zeros_like(new) if old is None else old
    return torch.where(is_read_R.view(-1, *(1,) * (new.ndim - 1)), new, old)

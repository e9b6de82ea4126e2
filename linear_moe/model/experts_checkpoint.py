"""How stacked expert weights are named in a checkpoint: exactly as Megatron's ``SequentialMLP`` names its own.

By default a global tensor has an axis for all experts of the layer, of which a rank holds a range. With
``singleton_local_shards`` every expert has its own key. The two halves of a gated ``fc1`` are stored one behind the
other (``[all gates, all ups]``), so that another expert tensor-parallel size can read them.

Every parameter maps to one sharded tensor or factory, which is what Megatron's optimizers build their own from.

Letters: E experts on this rank, O and I sizes of the output and input on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import (
    ReplicaId,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor

type Shards = ShardedTensor | ShardedTensorFactory


@dataclass(frozen=True)
class ExpertShards:
    """The place of this rank's experts among all.

    Attributes:
        num_local: E.
        ep_group: divides experts.
        tp_group: divides every expert.
        dp_group: holds replicas.
        sharded_offsets: axes that enclosing modules prepend (stacked layers).
        one_key_per_expert: Megatron's ``singleton_local_shards``.
    """

    num_local: int
    ep_group: dist.ProcessGroup
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    sharded_offsets: tuple[tuple[int, int, int], ...]
    one_key_per_expert: bool

    def fc1(self, key: str, weight_EOI: Tensor, gated: bool) -> Shards:
        """``[E, O, I]``, O divided over tensor-parallel ranks, gate and up halves apart."""
        return self._shards(key, weight_EOI, tp_dim=0, halves=2 if gated else 1)

    def fc2(self, key: str, weight_EOI: Tensor) -> Shards:
        """``[E, O, I]``, I divided over tensor-parallel ranks."""
        return self._shards(key, weight_EOI, tp_dim=1, halves=1)

    def extra_states(self, key: str) -> dict[int, ShardedObject]:
        """By local expert, the empty objects that ``SequentialMLP``'s linear layers want to find in a checkpoint."""
        objects = {}
        for e in range(self.num_local):
            expert = self.ep_group.rank() * self.num_local + e
            own_axis = (len(self.sharded_offsets), expert, self.ep_group.size() * self.num_local)
            objects[e] = make_sharded_object_for_checkpoint(
                None,
                _own_key(key, expert) if self.one_key_per_expert else key,
                self.sharded_offsets if self.one_key_per_expert else (*self.sharded_offsets, own_axis),
                replica_id=(0, self.tp_group.rank(), self.dp_group.rank()),
            )
        return objects

    def _shards(self, key: str, weight: Tensor, tp_dim: int, halves: int) -> Shards:
        replica_id = (0, 0, self.dp_group.rank())
        if halves == 1 and not self.one_key_per_expert:
            return self._stacked(key, weight, replica_id, tp_dim, half=0, halves=1)

        def build(key: str, weight: Tensor, replica_id: ReplicaId, flattened_range: slice | None) -> Any:
            assert flattened_range is None
            parts = list(weight.chunk(halves, dim=1 + tp_dim))
            if not self.one_key_per_expert:
                return [
                    self._stacked(key, part, replica_id, tp_dim, h, halves) for h, part in enumerate(parts)
                ]
            suffixes = ["_w", "_v"] if halves == 2 else [""]
            return [
                self._single(key, part[e], replica_id, tp_dim, e, suffix)
                for part, suffix in zip(parts, suffixes, strict=True)
                for e in range(self.num_local)
            ]

        def merge(parts: list[Tensor]) -> Tensor:
            if self.one_key_per_expert:
                parts = [
                    torch.stack(list(half)) for half in zip(*[iter(parts)] * self.num_local, strict=True)
                ]
            return torch.cat(parts, dim=1 + tp_dim)

        return ShardedTensorFactory(key, weight, torch.no_grad()(build), torch.no_grad()(merge), replica_id)

    def _stacked(
        self, key: str, weight_EOI: Tensor, replica_id: ReplicaId, tp_dim: int, half: int, halves: int
    ) -> ShardedTensor:
        """All local experts as one piece of a tensor with an axis for experts."""
        axis = len(self.sharded_offsets)
        tp_rank, tp_size = self.tp_group.rank(), self.tp_group.size()
        return ShardedTensor.from_rank_offsets(
            key,
            weight_EOI,
            *self.sharded_offsets,
            (axis, self.ep_group.rank(), self.ep_group.size()),
            (axis + 1 + tp_dim, half * tp_size + tp_rank, halves * tp_size),
            replica_id=replica_id,
            prepend_axis_num=axis,
        )

    def _single(
        self, key: str, weight_OI: Tensor, replica_id: ReplicaId, tp_dim: int, e: int, suffix: str
    ) -> ShardedTensor:
        """One expert under its own key."""
        axis = len(self.sharded_offsets)
        return ShardedTensor.from_rank_offsets(
            _own_key(key, self.ep_group.rank() * self.num_local + e) + suffix,
            weight_OI,
            *self.sharded_offsets,
            (axis + tp_dim, self.tp_group.rank(), self.tp_group.size()),
            replica_id=replica_id,
            prepend_axis_num=axis,
        )


def _own_key(key: str, expert: int) -> str:
    """``...experts.linear_fc1.weight`` as ``...experts.<expert>.linear_fc1.weight``."""
    head, experts, tail = key.rpartition("experts.")
    assert experts, key
    return f"{head}experts.{expert}.{tail}"

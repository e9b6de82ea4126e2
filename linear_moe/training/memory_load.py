"""How evenly the memories of every mixture are used, per layer and step, over all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from torch import nn

from linear_moe.model.mixer_layer import MixerLayer


class MemoryLoad:
    """Reads the tallies of :class:`~linear_moe.model.memory_balance.MemoryBalance`.

    Args:
        num_layers: layers of the model.
        num_memories: routed memories of the layers that are mixtures, by global index from 0.
    """

    def __init__(self, num_layers: int, num_memories: dict[int, int]) -> None:
        self.num_layers, self.num_memories = num_layers, num_memories
        self._layers: list[MixerLayer] = []

    def watch(self, model: nn.Module) -> None:
        """Take the tallies of this stage's layers."""
        found = [module for module in model.modules() if isinstance(module, MixerLayer)]
        self._layers += [layer for layer in found if layer.balance is not None]

    def take(self) -> dict[str, Any]:
        """A step's figures, per layer that is a mixture: ``memory_balance`` (1 is even) and ``memory_load``."""
        width = 2 + max(self.num_memories.values())
        tally = torch.zeros(self.num_layers, width, device=torch.cuda.current_device())
        for layer in self._layers:
            assert layer.balance is not None
            taken = layer.balance.take()
            tally[layer.balance.layer, : len(taken)] += taken
        dist.all_reduce(tally)
        # A micro-batch counts once on each of its ranks; each context-parallel rank has a part of its balance.
        mean = tally[:, 1:] / tally[:, :1].clamp(min=1)
        balance = (mean[:, 0] * mpu.get_context_parallel_world_size()).tolist()
        load = mean[:, 1:].tolist()
        return {
            "memory_layers": list(self.num_memories),
            "memory_balance": [balance[i] for i in self.num_memories],
            "memory_load": [load[i][:count] for i, count in self.num_memories.items()],
        }

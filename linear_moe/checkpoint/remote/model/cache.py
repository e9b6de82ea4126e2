"""What an exported model remembers between calls: a mixer a state of fixed size, a softmax layer keys and values.

Letters: B sequences, T tokens fed now.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from linear_moe.checkpoint.remote.model.configuration_linear_moe import SOFTMAX, LinearMoeConfig
from linear_moe.lsm.tables import MixerState


class MixerCacheLayer(CacheLayerMixin):
    """The state of a mixer after the tokens read so far; its size does not depend on their number."""

    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: MixerState | None = None
        self.num_columns = 0  # of the batch, padding included

    def store(self, state: MixerState | None, num_columns: int) -> None:
        """Keep the state after ``num_columns`` more columns of the batch."""
        self.state = state
        self.num_columns += num_columns
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """A mixer has neither keys nor values."""
        raise _not_keys()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A mixer has neither keys nor values."""
        raise _not_keys()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As of a softmax layer that has read the same tokens: the model has one mask."""
        return self.num_columns + query_length, 0

    def get_seq_length(self) -> int:
        """Columns of the batch read so far."""
        return self.num_columns

    def get_max_length(self) -> int:
        """None."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The same, as older versions of transformers call it."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.num_columns, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of a beam search."""
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some of the rows."""
        self._change(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        """To the CPU."""
        if self.state is not None:
            self.device = self.state.memory[0].device
        self._change(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """And back."""
        self._change(lambda x: x.to(self.device, non_blocking=True))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a state does not hold the earlier states.

        Raises:
            ValueError: for any number but 0.
        """
        if tokens_to_remove != 0:
            raise ValueError(
                f"{-tokens_to_remove} tokens cannot be taken back from the memory of a linear layer\n"
                "  why: a token changes all of it, and what it was before is not kept\n"
                "  try: generate without an assistant model or prompt lookup, or a fresh cache"
            )

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state is None:
            return
        fields = {field.name: getattr(self.state, field.name) for field in dataclasses.fields(self.state)}
        fields["memory"] = tuple(change(x) for x in self.state.memory)
        beside = {name: change(x) for name, x in fields.items() if isinstance(x, Tensor)}
        self.state = MixerState(**(fields | beside))


class LinearMoeCache(Cache):
    """One entry per layer, of the layer's kind.

    Args:
        config: the model's.
    """

    def __init__(self, config: LinearMoeConfig) -> None:
        kinds = config.layer_kinds or []
        super().__init__(layers=[DynamicLayer() if kind == SOFTMAX else MixerCacheLayer() for kind in kinds])

    def mixer(self, layer: int) -> MixerCacheLayer:
        """The entry of a layer that is a mixer."""
        entry = self.layers[layer]
        assert isinstance(entry, MixerCacheLayer)
        return entry

    def memory_size(self) -> int:
        """Bytes held now."""
        total = 0
        for entry in self.layers:
            held: list[Any] = [entry.keys, entry.values] if isinstance(entry, DynamicLayer) else []
            if isinstance(entry, MixerCacheLayer) and entry.state is not None:
                state = entry.state
                held = [*state.memory, state.conv, state.group_conv, state.hidden, state.length]
            total += sum(x.numel() * x.element_size() for x in held if isinstance(x, torch.Tensor))
        return total


def _not_keys() -> TypeError:
    return TypeError("the cache entry of a mixer holds its state, see MixerCacheLayer.store")

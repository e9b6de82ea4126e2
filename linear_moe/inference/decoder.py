"""A model and what it remembers of the sequences it has read: softmax layers all keys and values, mixers a fixed state.

Letters: B sequences, T tokens fed now, V rows of the vocabulary.
"""

from __future__ import annotations

from linear_moe.training import cpu

if cpu.needed():
    cpu.activate()  # before Megatron looks for a device

from dataclasses import dataclass

import torch
from megatron.core.inference.contexts.static_context import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from linear_moe.lsm import MixerState

PREFILL_CHUNK = 4096
"""Tokens of a prompt read at once: bounds the activations of a long prompt, changes no result."""


@dataclass(frozen=True)
class MemorySize:
    """Bytes that a decoder holds for its sequences."""

    recurrent: int
    """States of the mixers and the last inputs that they keep: the same after any number of tokens."""
    kv_cache: int
    """Keys and values of the softmax layers: grows with the longest sequence it was made for."""


class Decoder:
    """Reads tokens and predicts the next one; ``feed`` may be called with any number of tokens, any number of times.

    Args:
        model: in evaluation mode, on one process.
        batch_size: B.
        max_length: tokens that each sequence may reach; softmax layers reserve memory for them.
    """

    def __init__(self, model: GPTModel, batch_size: int, max_length: int) -> None:
        assert not model.training
        self.model = model
        self.context = StaticInferenceContext(batch_size, max_length)

    @property
    def length(self) -> int:
        """Tokens read so far, per sequence."""
        return self.context.sequence_len_offset

    @torch.no_grad()
    def feed(self, tokens_BT: Tensor, chunk: int = PREFILL_CHUNK) -> Tensor:
        """Read ``tokens_BT`` ``[B, T]`` int64, T >= 1; logits ``[B, V]`` of the next token, float32 or wider."""
        assert (
            tokens_BT.shape[1] >= 1 and self.length + tokens_BT.shape[1] <= self.context.max_sequence_length
        )
        logits_BV = torch.empty(0)
        for part_BL in tokens_BT.split(chunk, dim=1):
            logits_BV = self._step(part_BL)
        return logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))

    def _step(self, tokens_BT: Tensor) -> Tensor:
        start, T = self.length, tokens_BT.shape[1]
        positions_BT = torch.arange(start, start + T, device=tokens_BT.device).expand_as(tokens_BT)
        if start > 0 and T == 1:
            self.context.enable_decode_mode()
        else:
            self.context.enable_prefill_mode()
        # The mode is global: it is on for this call only, so that a caller may train between two steps.
        with InferenceMode.active():
            logits_B1V = self.model(
                tokens_BT, positions_BT, None, inference_context=self.context, runtime_gather_output=True
            )
        self.context.sequence_len_offset = start + T
        return logits_B1V[:, -1]

    def memory_size(self) -> MemorySize:
        """Bytes held now, on this process."""
        recurrent = kv_cache = 0
        for held in self.context.key_value_memory_dict.values():
            if isinstance(held, MixerState):
                beside = (held.conv, held.group_conv, held.hidden, held.length)
                recurrent += sum(_bytes(x) for x in (*held.memory, *beside) if x is not None)
            else:
                kv_cache += sum(_bytes(tensor) for tensor in held)
        return MemorySize(recurrent, kv_cache)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

"""A model and what it remembers of the sequences it has read: softmax layers all keys and values, mixers a fixed state.

Rows may differ in length. Prompts are read in chunks, all rows at once and none padded; then every row takes one token
per step. What a row gives depends on nothing but the row.

Letters: B rows, T tokens fed now, M tokens of all rows, D hidden, V rows of the vocabulary.
"""

from __future__ import annotations

from linear_moe.training import cpu

if cpu.needed():
    cpu.activate()  # before Megatron looks for a device

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from linear_moe.inference.experts import keep_tokens_here
from linear_moe.lsm import MixerState
from linear_moe.model.decoding import DecodingContext, state_tensors
from linear_moe.model.mixer_layer import MixerLayer
from linear_moe.model.mixer_options import check_supported

PREFILL_CHUNK = {"cuda": 4096, "cpu": 512}
"""Tokens of all prompts read at once: bounds the activations of long prompts, changes no result.

On a CPU, softmax attention needs a number for each of them and each cached token.
"""

Head = Callable[[Tensor, list[Tensor], Callable[[Tensor], Tensor]], Tensor]
"""What is wanted of a call: told its hidden states ``[M, D]``, where in them each row's tokens are, and the output
layer, ``[M, D]`` to ``[M, V]``."""


@dataclass(frozen=True)
class MemorySize:
    """Bytes that a decoder holds for its sequences."""

    recurrent: int
    """States of the mixers and the last inputs that they keep: the same after any number of tokens."""
    kv_cache: int
    """Keys and values of the softmax layers: grows with the longest sequence."""


class Decoder:
    """Reads tokens and predicts the next one; ``read`` and ``step`` in any order, any number of times.

    Args:
        model: in evaluation mode, on one process, or divided by tensor parallelism only.
        batch_size: B.
        max_length: tokens that each sequence may reach.
    """

    def __init__(self, model: GPTModel, batch_size: int, max_length: int) -> None:
        assert not model.training
        self.model = model
        self.batch_size = batch_size
        self.device = next(model.parameters()).device
        mixers = [x.self_attention for x in model.decoder.layers if isinstance(x.self_attention, MixerLayer)]
        has_cache = len(mixers) < len(model.decoder.layers)
        self.context = DecodingContext(batch_size, max_length, self.device, has_cache)
        for layer in mixers:
            # Prompts of different length are read packed.
            check_supported(layer.mixer, {"decode": True, "packed": batch_size > 1})
            capacity = getattr(layer.mixer.cfg, "capacity", None)  # single_process_arguments switches it off
            assert capacity is None, "what a memory takes would depend on the other tokens of a call"
        keep_tokens_here(model)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence so far."""
        return max(self.context.lengths)

    # ---- reading ----

    def read(self, rows: Sequence[Sequence[int] | Tensor], chunk: int | None = None) -> Tensor:
        """Read more tokens of every row; logits ``[B, V]`` after each row's last one, float32 or wider.

        Rows may differ in length; each has one token at least. ``chunk`` tokens of all rows are read in a call; None:
        as many as the device likes.
        """
        assert len(rows) == self.batch_size and all(len(row) for row in rows)
        tokens = [torch.as_tensor(row, dtype=torch.int64) for row in rows]
        found: list[Tensor | None] = [None] * self.batch_size
        chunk = chunk or PREFILL_CHUNK.get(self.device.type, 512)
        starts, first = self.context.lengths, 0
        self.context.reserve(max(start + len(row) for start, row in zip(starts, tokens, strict=True)))
        while any(len(row) > first for row in tokens):
            each = max(1, chunk // sum(len(row) > first for row in tokens))
            parts = [row[first : first + each] for row in tokens]
            ending = [i for i, row in enumerate(tokens) if first < len(row) <= first + each]
            logits = self.call(parts, self._after_last(parts, ending))
            for row, logits_V in zip(ending, logits, strict=True):
                found[row] = logits_V
            first += each
        logits_BV = torch.stack([x for x in found if x is not None])
        return logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))

    def _after_last(self, parts: Sequence[Tensor], rows: Sequence[int]) -> Head:
        """The logits after the last token of some rows; none need the output layer."""

        def head(hidden_MD: Tensor, places: list[Tensor], output: Callable[[Tensor], Tensor]) -> Tensor:
            if not rows:
                return hidden_MD[:0]
            return output(hidden_MD[torch.stack([places[row][-1] for row in rows]).to(hidden_MD.device)])

        return head

    @torch.no_grad()
    def call(self, parts: Sequence[Tensor], head: Head, *, packed: bool | None = None) -> Tensor:
        """Read these tokens of every row in one call; what ``head`` makes of them.

        Args:
            parts: int64 tokens of each row, on the host; some may be empty.
            head: see :data:`Head`.
            packed: lay rows end to end; None: if they differ in length.
        """
        reading = self.context.begin_reading([len(part) for part in parts], packed)
        tokens_BT = torch.cat(list(parts))[None] if reading.is_packed else torch.stack(list(parts))
        context = self.context

        def process(*, hidden_states: Tensor, output_layer: Any, **rest: Any) -> Tensor:
            def output(hidden_MD: Tensor) -> Tensor:
                logits_M1V, _ = output_layer(
                    hidden_MD[:, None], weight=rest["output_weight"], runtime_gather_output=True
                )
                logits: Tensor = rest["scale_logits"](logits_M1V)
                return logits[:, 0]

            return head(hidden_states.flatten(0, 1), reading.places(), output)

        # The mode is global: it is on for this call only, so that a caller may train between two steps.
        with InferenceMode.active():
            found: Tensor = self.model(
                tokens_BT.to(self.device),
                reading.positions_TB.T,
                None,
                inference_context=context,
                packed_seq_params=reading.packed_seq_params(context.max_sequence_length),
                runtime_gather_output=True,
                output_processor=process,
            )
        context.end_reading()
        return found

    # ---- one token at a time ----

    def step(self, tokens_B: Tensor) -> Tensor:
        """Read one token more of every row, ``[B]`` int64; logits ``[B, V]``, float32 or wider."""
        self.context.prepare_step()
        return self.advance(tokens_B)

    @torch.no_grad()
    def advance(self, tokens_B: Tensor) -> Tensor:
        """What a step does on the device: no waiting, the same addresses every time until the cache grows."""
        context = self.context
        context.begin_step()
        with InferenceMode.active():
            logits_B1V = self.model(
                tokens_B[:, None],
                context.lengths_B[:, None],
                None,
                inference_context=context,
                runtime_gather_output=True,
            )
        context.end_step()
        return logits_B1V[:, -1].to(torch.promote_types(logits_B1V.dtype, torch.float32))

    def feed(self, tokens_BT: Tensor, chunk: int | None = None) -> Tensor:
        """``read`` or ``step``: ``tokens_BT`` ``[B, T]`` int64, T >= 1; logits ``[B, V]`` of the next token."""
        assert tokens_BT.shape[1] >= 1
        if tokens_BT.shape[1] == 1 and min(self.context.lengths) > 0:
            return self.step(tokens_BT[:, 0].to(self.device))
        return self.read(list(tokens_BT), chunk)

    # ---- memory ----

    def memory_size(self) -> MemorySize:
        """Bytes held now, on this process."""
        recurrent = kv_cache = 0
        for held in self.context.key_value_memory_dict.values():
            if isinstance(held, MixerState):
                recurrent += sum(map(_bytes, state_tensors(held)))
            else:
                kv_cache += sum(map(_bytes, held.tensors))
        return MemorySize(recurrent, kv_cache)

    def jump(self, length: int, room: int = 0) -> None:
        """Pretend that every row has ``length`` tokens, for measurements: a step's time does not depend on them.

        One token must have been read; keys that were never written are zeros. The cache gets ``room`` for more.
        """
        self.context.reserve(length + room)
        self.context.set_lengths([length] * self.batch_size)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

"""One text that grows turn by turn: its decoder stays, and of each prompt only what is new is read.

A recurrent state cannot forget its last tokens, and steps run past the end of an answer before the host looks. So
states are kept as they were at two places: behind the prompt, and at the last look before the end. The next prompt goes
on from the later one of those that it extends token by token; keys and values beyond it are overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.models.gpt import GPTModel

from linear_moe.inference.decoder import Decoder
from linear_moe.model.decoding import Mark


class Conversation:
    """What a :class:`~linear_moe.inference.generate.Generation` of one prompt leaves to the next one.

    Attributes:
        num_kept: tokens of the last prompt that had been read before; 0: none, and all were read.
    """

    def __init__(self) -> None:
        self.num_kept = 0
        self._decoder: Decoder | None = None
        self._places: list[tuple[list[int], Mark]] = []

    def decoder_of(self, model: GPTModel, prompt: Sequence[int], max_length: int) -> Decoder:
        """A decoder that has read the first ``num_kept`` tokens of ``prompt``, and not all of them."""
        for tokens, mark in reversed(self._places):
            if len(tokens) < len(prompt) and tokens == list(prompt[: len(tokens)]):
                assert self._decoder is not None
                self._decoder.context.limit, self.num_kept = max_length, len(tokens)
                self._decoder.context.rewind(mark)
                return self._decoder
        self._decoder, self.num_kept, self._places = Decoder(model, 1, max_length), 0, []
        return self._decoder

    def begin(self, prompt: Sequence[int]) -> None:
        """The decoder has read all of ``prompt``."""
        self._places = []
        self.note(prompt)

    def note(self, tokens: Sequence[int]) -> None:
        """It has read these tokens, the prompt's first."""
        assert self._decoder is not None and self._decoder.length == len(tokens)
        self._places[1:] = [(list(tokens), self._decoder.context.mark())]

"""Text from tokens as they come: a character of several bytes may span tokens, and shows only when it is whole."""

from __future__ import annotations

from typing import Any

REPLACEMENT = "\ufffd"
"""What a tokenizer writes for bytes that are no character, or not yet one."""

CONTEXT = 8
"""Tokens of a prompt that are decoded again, and some more where they begin in the middle of a character."""

HELD = 16
"""Most replacement characters at the end of a text that may still become others. Byte-level tokenizers write one for
an unfinished character; with bytes as a fallback (SentencePiece) all bytes of a row are replaced until it is whole."""


class TextStream:
    """Feed tokens, get the text that they add.

    Only the tokens since the last whole character are decoded again, with those of the piece before it as context
    (many tokenizers treat the first token of a text in their own way).

    Args:
        tokenizer: has ``detokenize``.
        context: tokens before the first one fed; their text is not repeated.
    """

    def __init__(self, tokenizer: Any, context: list[int]) -> None:
        self.tokenizer = tokenizer
        self.tokens = self._end_of(context)
        self.done = len(self.tokens)  # tokens whose text is out, whole characters all
        self.shown = len(self._text(self.tokens))  # characters of `tokens` that are out

    def feed(self, token: int) -> str:
        """Text of ``token`` and of what was held back; empty in the middle of a character."""
        self.tokens.append(token)
        text = self._text(self.tokens)
        whole = text[:-HELD] + text[-HELD:].rstrip(REPLACEMENT)
        new, self.shown = whole[self.shown :], max(len(whole), self.shown)
        if whole == text:
            self.tokens, self.done = self.tokens[self.done :], len(self.tokens) - self.done
            self.shown = len(self._text(self.tokens))
        return new

    def flush(self) -> str:
        """The rest: a character that was cut short."""
        text = self._text(self.tokens)
        new, self.shown = text[self.shown :], len(text)
        return new

    def _end_of(self, context: list[int]) -> list[int]:
        parts = [context[-length:] for length in range(CONTEXT, CONTEXT + 4)]
        return next((part for part in parts if REPLACEMENT not in self._text(part)), parts[0])

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.detokenize(tokens) if tokens else ""

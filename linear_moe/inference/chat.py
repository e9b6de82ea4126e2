"""Conversations as the tokens that the model's chat template makes of them, and the tokens that end its turn."""

from __future__ import annotations

from typing import Any

ANSWER = "An answer."
"""Any text, to see what a template writes behind it."""

Messages = list[dict[str, str]]
"""``{"role": "user", "content": ".."}`` and so on, the first message first."""


class ChatTemplate:
    """The chat template of a tokenizer, or another one.

    Args:
        tokenizer: Megatron's, over one of transformers.
        source: Jinja template instead of the tokenizer's.

    Raises:
        ValueError: there is no template.
    """

    def __init__(self, tokenizer: Any, source: str | None = None) -> None:
        # Megatron hands out the text of a template only; ids come from the tokenizer below.
        self.tokenizer: Any = getattr(getattr(tokenizer, "_tokenizer", None), "tokenizer", None)
        self.eod: int = tokenizer.eod
        own = getattr(self.tokenizer, "chat_template", None)
        self.source = source or own
        if self.tokenizer is None or self.source is None:
            raise ValueError(
                "the run's tokenizer has no chat template\n"
                "  why: how turns are marked depends on what the model was trained with\n"
                "  try: --chat-template <file with a Jinja template>, or plain (as instructions are trained without "
                "one), or no --chat"
            )

    def prompt(self, messages: Messages) -> list[int]:
        """Tokens of a conversation that the model is to go on with.

        Raises:
            ValueError: the template refuses the messages.
        """
        text = self._text(messages, add_generation_prompt=True)
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return tokens

    def ends(self) -> list[int]:
        """Tokens that end an answer: the end of the text, and the end of a turn where it is another token."""
        question = {"role": "user", "content": "A question?"}
        text = self._text([question, {"role": "assistant", "content": ANSWER}])
        behind = text[text.rindex(ANSWER) + len(ANSWER) :] if ANSWER in text else ""
        tokens = self.tokenizer.encode(behind.lstrip(), add_special_tokens=False)
        special = {id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return sorted({self.eod, *(tokens[:1] if set(tokens[:1]) <= special else ())})

    def _text(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateError as error:
            raise ValueError(
                f"the chat template refuses the conversation: {error}\n"
                f"  why: a template knows certain roles, in a certain order\n"
                f"  try: without --system, or --chat-template <file with a Jinja template>"
            ) from None
        return text

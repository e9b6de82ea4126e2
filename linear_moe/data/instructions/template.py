"""A conversation as the text a model reads, and the stretches of it that it has to learn to write.

The chat template of the tokenizer writes the text. What it adds with a turn of the assistant, behind the prompt that it
would give at generation, is learned: the answer and its end of turn. The last answer is followed by the end-of-text
token, learned too, if the template does not write it itself.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linear_moe.data.instructions.records import Conversation

PLAIN_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if not loop.first %}{{ '\\n\\n' }}{% endif %}
{%- if message.role == 'assistant' %}{{ '### Response:\\n' + message.content + eos_token }}
{%- elif message.role == 'user' %}{{ '### Instruction:\\n' + message.content }}
{%- else %}{{ message.content }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"""
"""For instructions, where the tokenizer has no chat template."""


@dataclass(frozen=True)
class Rendered:
    """Text of a sample, cut where learning starts and stops."""

    pieces: tuple[str, ...]
    """Joined, the text. Every second piece is learned: prompt, answer, prompt, answer, ..."""

    @property
    def text(self) -> str:
        """The whole."""
        return "".join(self.pieces)


class ChatTemplate:
    """Renders conversations with the template of a tokenizer, or with one that is given.

    Args:
        tokenizer: of transformers.
        template: Jinja source instead of the tokenizer's; ``None``: the tokenizer's, and for instructions
            ``PLAIN_TEMPLATE`` if it has none.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        own = tokenizer.chat_template
        own = own.get("default") if isinstance(own, dict) else own
        self.foreign: str | None = template or (PLAIN_TEMPLATE if own is None else None)
        self.knows_roles = template is not None or own is not None
        self.source: str = self.foreign or str(own)
        self.eos: str = tokenizer.eos_token
        added = tokenizer.added_tokens_decoder.values()
        self.special = tuple(token.content for token in added if token.special)

    def render(self, sample: Conversation) -> list[Rendered]:
        """The text of a sample up to its last answer.

        Some templates write earlier turns otherwise than the last one (they leave out its thoughts). A conversation is
        then one text for each answer, as the model will be asked.

        Raises:
            ValueError: there is no chat template, it refuses the messages, or an answer does not follow its prompt.
        """
        if sample.has_roles and not self.knows_roles:
            raise ValueError(
                f"{sample.where} has messages, but the tokenizer has no chat template\n"
                f"  why: how turns are marked depends on the model, and a wrong guess is learned silently\n"
                f"  try: CHAT_TEMPLATE=<file with a Jinja template>, CHAT_TEMPLATE=plain (headings), or the tokenizer "
                f"of a chat model"
            )
        if sample.tools and "tools" not in self.source:
            raise ValueError(
                f"{sample.where} has tools, and the chat template does not write them\n"
                f"  why: the model would learn to call what no prompt names\n"
                f"  try: CHAT_TEMPLATE=<file with a Jinja template that has tools>, or lines without them"
            )
        answers = [i for i, message in enumerate(sample.messages) if message["role"] == "assistant"]
        parts = [self._cut(sample, answers)]
        if parts[0] is None:
            parts = [self._cut(sample, [answer]) for answer in answers]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            raise self._rewrites(sample.where)
        return found

    def _cut(self, sample: Conversation, answers: list[int]) -> Rendered | None:
        """The text up to the last of the ``answers``, all of which are learned; ``None`` if it cannot be cut there."""
        messages, last = sample.messages[: answers[-1] + 1], answers[-1]
        text = self._text(sample, messages)
        pieces, done = [], 0
        for i in answers:
            prompt = self._text(sample, messages[:i], prompt=True)
            turn = self._text(sample, messages[: i + 1])
            if not (text.startswith(turn) and turn.startswith(prompt) and done <= len(prompt) < len(turn)):
                return None
            turn = self._until_special(turn) if i < last else self._ended(turn)
            pieces += [turn[done : len(prompt)], turn[len(prompt) :]]
            done = len(turn)
        return Rendered(tuple(pieces))

    def _text(self, sample: Conversation, messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
        from jinja2 import TemplateError

        if not messages:
            return ""
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=sample.tools,
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise ValueError(
                f"{sample.where} does not fit the chat template: {error}\n"
                f"  why: a template knows certain roles, in a certain order\n"
                f"  try: other messages, or CHAT_TEMPLATE=<file with a Jinja template>"
            ) from None

    def _until_special(self, turn: str) -> str:
        # A line break behind the end of a turn is not the assistant's to write.
        bare = turn.rstrip()
        return bare if bare.endswith(self.special) else turn

    def _ended(self, turn: str) -> str:
        bare = turn.rstrip()
        return bare if bare.endswith(self.eos) else turn + self.eos

    @staticmethod
    def _rewrites(where: str) -> ValueError:
        return ValueError(
            f"{where} cannot be split into prompts and answers by the chat template\n"
            f"  why: what the template writes with an answer does not begin with the prompt that it gives for it\n"
            f"  try: CHAT_TEMPLATE=<file with a Jinja template that only adds text>"
        )


def read_template(path: str) -> str:
    """A Jinja chat template from a file; ``plain`` is ``PLAIN_TEMPLATE``.

    Raises:
        ValueError: it cannot be read.
    """
    if path == "plain":
        return PLAIN_TEMPLATE
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"CHAT_TEMPLATE={path} cannot be used: {error}\n"
            f"  why: it is the file of a Jinja template, or the word plain\n"
            f"  try: CHAT_TEMPLATE=<folder of a chat model>/chat_template.jinja"
        ) from None

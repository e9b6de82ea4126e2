"""A small chat tokenizer, toy instructions, and finetuning of a tiny model on them in the pool of workers."""

import json
import random
from pathlib import Path
from typing import Any

from linear_moe.data.instructions.prepare import Prepared, prepare
from linear_moe.data.tokenizer import describe_tokenizer, train_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The template of Qwen2: a line break follows the end of a turn."""

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Peru": "Lima", "Egypt": "Cairo", "Japan": "Tokyo",
    "Kenya": "Nairobi", "Norway": "Oslo", "Cuba": "Havana", "Chile": "Santiago", "Greece": "Athens",
    "Poland": "Warsaw", "Ireland": "Dublin", "Latvia": "Riga", "Ghana": "Accra", "Nepal": "Kathmandu",
}  # fmt: skip


def toy_messages() -> list[dict[str, Any]]:
    """One question and one answer each."""
    return [
        {"messages": [{"role": "user", "content": country}, {"role": "assistant", "content": capital}]}
        for country, capital in CAPITALS.items()
    ]


def mixed_messages(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of one to three rounds, of very different lengths and shares of answers."""
    draw = random.Random(seed)
    words = [*CAPITALS, *CAPITALS.values()]

    def text(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, most)))

    def rounds() -> list[dict[str, str]]:
        found = []
        for _ in range(draw.randint(1, 3)):
            found += [{"role": "user", "content": text(4)}, {"role": "assistant", "content": text(3)}]
        return found

    return [{"messages": rounds()} for _ in range(count)]


def write_lines(path: Path, records: list[Any]) -> str:
    """JSONL; texts are written as they are."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def chat_tokenizer(folder: Path, eos: str = "<|im_end|>", template: str | None = CHATML) -> str:
    """A tokenizer of 320 tokens with the marks of turns, and a chat template unless it is ``None``."""
    from transformers import PreTrainedTokenizerFast

    train_tokenizer([*CAPITALS, *CAPITALS.values(), "user assistant\n"] * 4, 318, str(folder))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = eos
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def prepared(tokenizer: str, path: str, cache: Path, seq_length: int = 64, **options: Any) -> Prepared:
    """:func:`prepare` with the fingerprint of the tokenizer."""
    fingerprint = describe_tokenizer(tokenizer).fingerprint
    return prepare([path], tokenizer, cache, fingerprint=fingerprint, seq_length=seq_length, **options)

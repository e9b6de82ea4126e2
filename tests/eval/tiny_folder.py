"""A tiny exported model with a tokenizer of characters, for the evaluation harness, and questions to ask it."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

from tests.checkpoint.remote_models import of_mixers, write_folder

KINDS = ["gated_deltanet", "softmax", "mom_gla"]
CHARACTERS = [chr(code) for code in range(32, 127)]


def write_model(rank: int, world: int, folder: Path) -> None:
    """In a worker of the pool: a hybrid with experts and memories, and its tokenizer."""
    flags = ["--mom-gla-num-memories", "3", "--seq-length", "256", "--max-position-embeddings", "256"]
    write_folder(folder, of_mixers(KINDS, *flags, moe=True), new_tokens=1, noise=0.1)
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """One token per character; the end of a text is token 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<eos>", "<unk>", "\n", *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


def questions(count: int = 40) -> list[dict[str, Any]]:
    """Multiple choice of unequal length, the same every time."""
    letters = string.ascii_lowercase
    found = []
    for i in range(count):
        word = letters[i % 23 : i % 23 + 1 + i % 7]
        found.append(
            {
                "question": f"After {word} comes",
                "choices": [word[::-1] * (1 + i % 3), word, letters[i % 11 : i % 11 + 4]],
                "answer": i % 3,
                "text": f"{word} {word[::-1]}. " * (1 + i % 4),
            }
        )
    return found


def write_questions(path: Path) -> None:
    """``tasks/tiny.jsonl``, which is kept in the repository."""
    path.write_text("".join(json.dumps(question) + "\n" for question in questions()))

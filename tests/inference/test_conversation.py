"""Turns of a conversation on a kept state give the tokens, logits and draws of reading everything anew."""

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import pytest

from tests.inference.models import prompts, random_family, random_model

KINDS = {
    "mixers": ["rwkv7", "hgrn2", "mamba2", "mom_gated_deltanet", "gsa", "softmax"],
    "one mixer": ["gated_deltanet"] * 2,
    "softmax": ["softmax"] * 2,
    "latent": ["kda", "softmax"],
}
DRAW: dict[str, Any] = {"temperature": 1.0, "top_k": 20}
TURNS = 4


def turns(rank: int, world: int, name: str, look_every: int, change: str) -> list[tuple[Any, ...]]:
    """Of each turn: answer, answer when all is read anew, length of the prompt, tokens read of it."""
    from linear_moe.inference.conversation import Conversation
    from linear_moe.inference.decoder import Decoder
    from linear_moe.inference.generate import Generation, generate

    fp64 = ("--moe-router-dtype", "fp64")
    loaded = random_family("deepseek_v2", "A2.4B", KINDS[name] * 2, *fp64) if name == "latent" else None
    loaded = loaded or random_model(KINDS[name], *fp64, moe=True)
    conversation, texts, found = Conversation(), prompts(TURNS, 9), []
    text: list[int] = []
    read = Decoder.read
    counts: list[int] = []

    def counted(self: Decoder, rows: Sequence[Any], chunk: int | None = None) -> Any:
        counts.append(len(rows[0]))
        return read(self, rows, chunk)

    for turn, new in enumerate(texts):
        text = text + new
        options = {**DRAW, "max_new_tokens": 20, "seed": turn, "eos": list(range(10))}
        (anew,) = generate(loaded, [text], **options)
        with patch.object(Decoder, "read", counted):
            steps = Generation(
                loaded, [text], look_every=look_every, conversation=conversation, prefill_chunk=4, **options
            )
            answer = [token for (token,) in steps]
        assert len(conversation._places) <= 2, "each keeps all states"
        found.append((answer, anew, len(text), counts.pop()))
        text = text + answer
        if change == "answers" and answer:  # as text that is tokenized again may be
            text[-len(answer)] = 126 - text[-len(answer)]
        elif change == "all":
            text = [126 - token for token in text]
    return found


@pytest.mark.parametrize(
    ("name", "look_every", "change"),
    [
        *(("mixers", look, change) for look in (1, 8) for change in ("nothing", "answers", "all")),
        ("one mixer", 8, "nothing"),
        ("softmax", 8, "nothing"),
        ("softmax", 3, "answers"),
        ("latent", 8, "nothing"),
    ],
)
def test_a_turn_is_what_reading_everything_gives(gloo, name, look_every, change):
    found = gloo(1, turns, name, look_every, change)[0]
    lengths = {len(answer) for answer, *_ in found}
    assert len(lengths) > 1 and min(lengths) < 20, "answers end at different places"
    before = 0
    for answer, anew, length, read in found:
        assert answer == anew
        if change == "all":
            assert read == length
        elif change == "answers":
            assert read == length - before, "the answer is read again, and nothing before it"
        else:
            last = 0 if before == 0 else length - 9 - before
            assert read <= 9 + min(look_every + 1, last), "new tokens, and those since the last look"
        before = length


def asked_again(rank: int, world: int) -> list[Any]:
    """Answers to one prompt, asked twice, and to its beginning; with what each had in memory."""
    from linear_moe.inference.conversation import Conversation
    from linear_moe.inference.generate import Generation

    loaded, conversation, found = random_model(["gla", "softmax"], moe=False), Conversation(), []
    (text,) = prompts(1, 12)
    for prompt in (text, text, text[:7]):
        steps = Generation(loaded, [prompt], max_new_tokens=5, conversation=conversation)
        found.append(([token for (token,) in steps], conversation.num_kept))
    return found


def test_the_same_prompt_again(gloo):
    """Nothing of it is new, and what follows is predicted from its last token: all is read once more."""
    first, again, beginning = gloo(1, asked_again)[0]
    assert first == again and first[1] == beginning[1] == 0

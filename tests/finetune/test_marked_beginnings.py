"""Tokenizers that mark where a text begins, and put a token before it, as those of Llama 2 and Mixtral do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from linear_moe.data.instructions.template import Rendered
from linear_moe.data.instructions.tokens import tokenize

WORDS = ["<s>", "?", ":", "_Peru", "Peru", "_Lima", "Lima", "_Rome", "Rome", "_a", "_ab", "a", "b"]


@pytest.fixture
def backend() -> Any:
    """One token a word, and a colon between; the first word of a text has a mark though nothing is before it."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    mark = pre_tokenizers.Metaspace(replacement="_", prepend_scheme="first")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(":", "isolated"), mark])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def words_of(sample: Any) -> list[str]:
    return [WORDS[i] for i in sample.tokens]


def test_pieces_keep_the_tokens_of_the_whole_text(backend):
    """Every piece alone would have a mark, and a <s>; learned are the tokens behind those of the beginning before."""
    texts = [Rendered(("Peru:", "Lima:", "Peru:Peru:", "Rome")), Rendered(("Peru Lima:", "Lima Lima"))]
    first, second = tokenize(backend, texts)
    assert words_of(first) == ["_Peru", ":", "Lima", ":", "Peru", ":", "Peru", ":", "Rome"]
    assert first.learned.tolist() == [False] * 2 + [True] * 2 + [False] * 4 + [True]
    assert words_of(second) == ["_Peru", "_Lima", ":", "Lima", "_Lima"]
    assert second.learned.tolist() == [False, False, False, True, True]


def test_pieces_alone_where_a_token_reaches_over_the_border(backend):
    """At one border of three: the pieces' own tokens then, marks and all, at every border."""
    (sample,) = tokenize(backend, [Rendered(("Peru:", "Lima", " a", "b"))])
    assert words_of(sample) == ["_Peru", ":", "_Lima", "_a", "?"], "b alone begins a text: _b is no word"
    assert sample.learned.tolist() == [False, False, True, False, True]
    assert sample.tokens.dtype == np.int32 and sample.learned.dtype == np.bool_


def test_a_cut_keeps_the_token_that_is_only_predicted(backend):
    (sample,) = tokenize(backend, [Rendered(("Peru Peru", " Lima Rome"))])
    cut = sample.cut(2)
    assert sample.positions == 3 and cut.positions == 2
    assert words_of(cut) == ["_Peru", "_Peru", "_Lima"] and cut.learned.tolist() == [False, False, True]


def test_the_chat_template_alone_writes_what_begins_a_conversation(backend, tmp_path: Path):
    """Not the tokenizer once more, which would put its token before the text, and before every piece."""
    from transformers import PreTrainedTokenizerFast

    from linear_moe.data.instructions.prepare import prepare
    from tests.finetune.chat import write_lines

    template = "<s>{% for m in messages %}{{ ' ' + m.content }}{% endfor %}"
    backend.add_special_tokens(["<s>"])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="?", chat_template=template
    ).save_pretrained(tmp_path / "tok")
    rounds = [{"role": "user", "content": "Peru"}, {"role": "assistant", "content": "Lima"}]
    lines = write_lines(tmp_path / "lines.jsonl", [{"messages": rounds}])
    samples = prepare([lines], str(tmp_path / "tok"), tmp_path / "cache", fingerprint="", seq_length=16)
    assert words_of(samples.sample(0)) == ["<s>", "_Peru", "_Lima", "?"]
    assert samples.sample(0).learned.tolist() == [False, False, True, True]

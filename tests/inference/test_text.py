"""Text that streams: every piece is whole characters, and the pieces make the text of all tokens."""

import pytest

from linear_moe.inference.text import REPLACEMENT, TextStream

TEXT = "def f(x):\n    return x  # \u00e9t\u00e9, \u65e5\u672c\u8a9e, \U0001f600\U0001f469\u200d\U0001f680 and \u00df\n"


class Bytes:
    """A tokenizer of single bytes, as a byte-level BPE falls back to."""

    def tokenize(self, text):
        return list(text.encode())

    def detokenize(self, tokens):
        return bytes(tokens).decode(errors="replace")


class Words:
    """A tokenizer that drops the space before the first word, as SentencePiece does."""

    def detokenize(self, tokens):
        return " ".join(f"w{token}" for token in tokens)


def pieces(tokenizer, prompt, tokens):
    stream = TextStream(tokenizer, prompt)
    return [stream.feed(token) for token in tokens], stream.flush()


@pytest.mark.parametrize("prompt", ["", "a prompt of some length ", "\u65e5"])
def test_pieces_are_whole_characters_and_make_the_text(prompt):
    tokenizer = Bytes()
    fed, rest = pieces(tokenizer, tokenizer.tokenize(prompt), tokenizer.tokenize(TEXT))
    assert "".join(fed) == TEXT and rest == ""
    assert [piece for piece in fed if piece] == list(TEXT), "a character shows with its last byte"


def test_bytes_that_are_no_character_show_with_the_next_one():
    smile = "\U0001f600".encode()
    fed, rest = pieces(Bytes(), [], [*b"a", 0xFF, *smile[:2], *b"b", *smile[:3]])
    assert fed == ["a", "", "", "", 2 * REPLACEMENT + "b", "", "", ""]
    assert rest == REPLACEMENT
    fed, rest = pieces(Bytes(), [], [0xFF] * 40)
    assert "".join(fed) == 24 * REPLACEMENT, "those that cannot change any more are not held"
    assert rest == 16 * REPLACEMENT


def test_only_the_last_tokens_are_decoded_again():
    """However long the prompt and the text are: a token of a long answer costs what the first one did."""

    class Counted(Bytes):
        most = 0

        def detokenize(self, tokens):
            self.most = max(self.most, len(tokens))
            return super().detokenize(tokens)

    tokenizer = Counted()
    fed, _ = pieces(tokenizer, tokenizer.tokenize("a prompt " * 40), tokenizer.tokenize(TEXT * 5))
    assert "".join(fed) == TEXT * 5 and tokenizer.most <= 16


def with_fallback():
    """As Mixtral's: words, and bytes for all other characters; what is decoded as bytes is decoded as a whole."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b"]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return Backend(tokenizer)


@pytest.mark.parametrize("text", ["a \U0001f600\u00e9\u65e5 b\u00df", "\u00e9\u65e5 b"])
@pytest.mark.parametrize("prompt", ["", "a b ", "\u65e5\u672c\u8a9e\u65e5\u672c\u8a9e", "\u65e5\u00e9a"])
def test_bytes_as_a_fallback(prompt, text):
    """Also right behind bytes of the prompt, of which a part of one would spoil all that follow."""
    tokenizer = with_fallback()
    fed, rest = pieces(tokenizer, tokenizer.tokenize(prompt), tokenizer.tokenize(text))
    assert [piece for piece in fed if piece] == list(text) and rest == ""


def test_spaces_before_words_come_with_the_words():
    assert pieces(Words(), [1, 2], [3, 4, 5]) == ([" w3", " w4", " w5"], "")
    assert pieces(Words(), [], [3, 4]) == (["w3", " w4"], "")


class Backend:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def tokenize(self, text):
        return self.tokenizer.encode(text).ids

    def detokenize(self, tokens):
        return self.tokenizer.decode(tokens)


def test_a_trained_tokenizer(tmp_path):
    from tokenizers import Tokenizer

    from linear_moe.data.tokenizer import train_tokenizer

    train_tokenizer(["hello world, " * 5, TEXT[:10]], 280, str(tmp_path))
    tokenizer = Backend(Tokenizer.from_file(str(tmp_path / "tokenizer.json")))
    fed, rest = pieces(tokenizer, tokenizer.tokenize("hello "), tokenizer.tokenize(TEXT))
    assert "".join(fed) + rest == TEXT
    assert not any(REPLACEMENT in piece for piece in fed)
    assert len(fed) > len(TEXT), "the tokenizer knows none of the longer characters"

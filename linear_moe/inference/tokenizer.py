"""Which tokenizer a run's tokens are of: the copy in its folder, or one that is given because that has moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from linear_moe.data.tokenizer import TokenizerError, added_tokens, describe_tokenizer


def tokenizer_folder(run: Path, saved: dict[str, Any]) -> str | None:
    """The run's copy of its tokenizer, or where the training found it."""
    kept = run / "tokenizer"
    recorded: str | None = saved["tokenizer"]["tokenizer_model"]
    return str(kept.absolute()) if recorded and (kept / "tokenizer.json").is_file() else recorded


def check_given(given: Path | str, run: Path, saved: dict[str, Any]) -> str | None:
    """What to warn of where ``given`` stands for the tokenizer of a run; nothing where the two are the same.

    A run whose own tokenizer is not to be found can only be held against the number of its rows.

    Raises:
        ValueError: its tokens mean other text than those that the model has learned, or it has no row for some.
    """
    own, rows = tokenizer_folder(run, saved), saved["architecture"]["padded_vocab_size"]
    try:
        size = describe_tokenizer(str(given)).vocab_size
    except TokenizerError:
        return None  # whoever opens it will tell
    try:
        added = added_tokens(own, str(given)) if own else 0
        is_known = own is not None
    except TokenizerError:
        added, is_known = 0, False
    if added is None:
        raise ValueError(
            f"--tokenizer {given} is another one than {own}, the run's\n"
            f"  why: the model reads and writes the tokens of that one, which are other text in this one\n"
            f"  try: leave it out, or the run's own where it has moved to"
        )
    if size > rows and not (is_known and added == 0):
        raise ValueError(
            f"--tokenizer {given} has {size} tokens, and the model {rows} rows for them\n"
            f"  why: it is another one than the one that the run was trained with\n"
            f"  try: that one, where it has moved to"
        )
    if added == 0:
        return None
    return f"{given} has {added} tokens more than {own}: the model has not learned them"

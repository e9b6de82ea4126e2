"""A tokenizer that is given for a run in place of its own: the same, one with more tokens, or another one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from linear_moe.inference.tokenizer import check_given, tokenizer_folder
from tests.data.token_files import write_tokenizer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """With a copy of its tokenizer of 300 tokens."""
    write_tokenizer(tmp_path / "run" / "tokenizer")
    return tmp_path / "run"


def saved(rows: int = 384, path: Path | str | None = "/gone/tok") -> dict[str, Any]:
    tokenizer = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": path and str(path)}
    return {"tokenizer": tokenizer, "architecture": {"padded_vocab_size": rows}}


def other(run: Path, change: Any = None) -> Path:
    """A copy of the run's, changed."""
    folder = run.parent / "other"
    shutil.copytree(run / "tokenizer", folder, dirs_exist_ok=True)
    if change is not None:
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def with_more(count: int) -> Any:
    tokens = [{"id": 300 + i, "content": f"<|{i}|>", "special": True} for i in range(count)]
    return lambda content: content["added_tokens"].extend(tokens)


def test_the_copy_in_the_run_comes_first(run: Path):
    assert tokenizer_folder(run, saved()) == str((run / "tokenizer").absolute())
    (run / "tokenizer" / "tokenizer.json").unlink()
    assert tokenizer_folder(run, saved()) == "/gone/tok"
    assert tokenizer_folder(run, saved(path=None)) is None


def test_the_same_tokens_are_nothing_to_tell(run: Path):
    """Even where the model has fewer rows than they are: they are those that it was trained with."""
    assert check_given(other(run), run, saved()) is None
    assert check_given(other(run), run, saved(rows=256)) is None


def test_more_tokens_are_told(run: Path):
    given = other(run, with_more(2))
    told = check_given(given, run, saved())
    assert told is not None and told.startswith(
        f"{run.parent / 'other'} has 2 tokens more than {run / 'tokenizer'}"
    )
    with pytest.raises(
        ValueError, match=r"has 302 tokens, and the model 301 rows for them\n  why: .*\n  try: "
    ):
        check_given(given, run, saved(rows=301))


def test_other_tokens_are_refused(run: Path):
    given = other(run, lambda content: content["model"]["merges"].reverse())
    with pytest.raises(
        ValueError, match=r"is another one than .*, the run's\n  why: .*\n  try: leave it out"
    ):
        check_given(given, run, saved())


@pytest.mark.parametrize("path", ["/gone/tok", None], ids=["gone", "none"])
def test_without_the_run_s_own_its_rows_decide(run: Path, path: str | None):
    given = other(run)
    shutil.rmtree(run / "tokenizer")
    assert check_given(given, run, saved(rows=300, path=path)) is None
    with pytest.raises(ValueError, match="has 300 tokens, and the model 299 rows"):
        check_given(given, run, saved(rows=299, path=path))


def test_what_is_no_tokenizer_is_told_by_who_opens_it(run: Path):
    assert check_given(run.parent, run, saved()) is None

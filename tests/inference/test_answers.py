"""Answers on the disk as they are done, under the name of the file when all are there."""

import json
from pathlib import Path

import pytest

from linear_moe.inference.answers import Answers

ROWS = [{"prompt": "a", "text": "\u2028b", "tokens": [1]}, {"prompt": "c", "text": "d", "tokens": []}]


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_each_answer_as_it_is_done(tmp_path: Path):
    file, part = tmp_path / "x.jsonl", tmp_path / "x.jsonl.part"
    file.write_text("older\n")
    with Answers(str(file), 2, is_writer=True) as answers:
        for count, row in enumerate(ROWS, start=1):
            answers.add([row])
            assert read(part) == ROWS[:count] and file.read_text() == "older\n"
    assert read(file) == ROWS and not part.exists()


def test_a_job_that_is_stopped_keeps_what_it_had(tmp_path: Path, capsys: pytest.CaptureFixture):
    file, part = tmp_path / "x.jsonl", tmp_path / "x.jsonl.part"
    with pytest.raises(KeyboardInterrupt), Answers(str(file), 5, is_writer=True) as answers:
        answers.add(ROWS)
        raise KeyboardInterrupt
    assert read(part) == ROWS and not file.exists()
    assert capsys.readouterr().err == f"linear_moe: 2 of 5 answers are in {part}\n"
    with pytest.raises(ValueError), Answers(str(file), 5, is_writer=True):
        raise ValueError
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().err == "", "there was nothing to keep"
    with Answers(str(file), 1, is_writer=False) as answers:
        answers.add(ROWS)
    assert list(tmp_path.iterdir()) == [], "another process writes"


def test_where_answers_cannot_be_written(tmp_path: Path):
    (tmp_path / "x.part").mkdir()
    with pytest.raises(
        ValueError, match=r"/x.part cannot be written: Is a directory\n  why: .*\n  try: --output "
    ):
        Answers(str(tmp_path / "x"), 1, is_writer=True).__enter__()
    full = Answers("/dev/full", 1, is_writer=True)
    with (
        pytest.raises(ValueError, match=r"^/dev/full cannot be written: No space left on device\n  why: "),
        full,
    ):
        full.add(ROWS)
    with Answers("/dev/null", 2, is_writer=True) as answers:
        answers.add(ROWS)

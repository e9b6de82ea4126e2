"""Answers on the disk as they are done, under the name of the file when all are there."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

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
    assert capsys.readouterr().err == f"linear_moe: 2 of 5 answers are in {part}, and stay there\n"
    for is_writer in (True, False):
        with pytest.raises(ValueError) as refused:
            Answers(str(file), 5, is_writer=is_writer)
        what, _, instead = str(refused.value).splitlines()
        assert (
            what == f"{part} has the first 2 answers of a job that was stopped" and "first 2, with" in instead
        )
    assert read(part) == ROWS, "the next start lost them"
    part.write_text("")
    with pytest.raises(KeyError), Answers(str(file), 5, is_writer=True):
        raise KeyError
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().err == "", "there was nothing to keep"
    with Answers(str(file), 1, is_writer=False) as answers:
        answers.add(ROWS)
    assert list(tmp_path.iterdir()) == [], "another process writes"


def test_where_answers_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "x.part").mkdir()
    with pytest.raises(
        ValueError, match=r"/x.part cannot be written: Is a directory\n  why: .*\n  try: --output "
    ):
        Answers(str(tmp_path / "x"), 1, is_writer=True).__enter__()

    def full_disk(text: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    full = Answers(str(tmp_path / "y"), 1, is_writer=True)
    with (
        pytest.raises(ValueError, match=r"/y.part cannot be written: No space left on device\n  why: "),
        full,
    ):
        monkeypatch.setattr(full, "stream", SimpleNamespace(write=full_disk, close=full.stream.close))
        full.add(ROWS)


def test_a_name_that_cannot_be_taken(tmp_path: Path, capsys: pytest.CaptureFixture):
    """All are there, and stay where they are."""
    file, part = tmp_path / "x", tmp_path / "x.part"
    answers = Answers(str(file), 2, is_writer=True)
    with pytest.raises(ValueError, match=r"x.part cannot be written: Is a directory\n  why: "), answers:
        answers.add(ROWS)
        file.mkdir()
    assert read(part) == ROWS
    assert capsys.readouterr().err == f"linear_moe: 2 of 2 answers are in {part}, and stay there\n"


def test_what_is_no_file_keeps_its_name(tmp_path: Path):
    """A pipe that somebody reads, to its end, after the last answer; a device has no other name, either."""
    os.mkfifo(pipe := tmp_path / "pipe")

    def write() -> None:
        with Answers(str(pipe), 4, is_writer=True) as answers:
            answers.add(ROWS)
            answers.add(ROWS)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    assert read(pipe) == ROWS + ROWS
    writer.join(5)
    assert not writer.is_alive() and list(tmp_path.iterdir()) == [pipe] and pipe.is_fifo()


def test_the_pipe_behind_standard_output():
    """What /dev/stdout is in `| head`: a link to no name of a file."""
    reader, writer = os.pipe()
    with Answers(f"/dev/fd/{writer}", 2, is_writer=True) as answers:
        answers.add(ROWS)
    assert [json.loads(line) for line in os.read(reader, 1000).splitlines()] == ROWS
    os.close(reader)
    os.close(writer)


def test_answers_of_a_stopped_job_are_told_before_a_model_is_loaded(tmp_path: Path):
    (tmp_path / "x.jsonl.part").write_text("{}\n")
    tool = [sys.executable, "tools/generate.py", "--load", str(tmp_path / "run"), "--prompt", "a"]
    argv = [*tool, "--output", str(tmp_path / "x.jsonl")]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(argv, cwd=root, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr.startswith(
        f"linear_moe: {tmp_path}/x.jsonl.part has the first 1 answers "
    )
    assert (tmp_path / "x.jsonl.part").read_text() == "{}\n"

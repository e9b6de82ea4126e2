"""Documents of an installed Python, from a small one; and of files, with what is left out."""

import sysconfig
from pathlib import Path

import pytest

from linear_moe.data.corpus import python_documents, read_documents

TEXT = "x" * 201


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def put(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def test_the_documents_of_an_installed_python(library: Path):
    """The manual first; then files by their path, which is a fixed order; no tests, generated or binary files."""
    topics = '"""Generated."""\nother = 3\ntopics = {"while": "WHILE", "assert": "ASSERT"}\n'
    put(library / "pydoc_data" / "topics.py", topics + "#" * 300)
    kept = ["a.py", "a/z.txt", "a-b.rst", "b/c/d.py", "tests.py", "config-notes.txt"]
    for name in kept:
        put(library / name, f"{name} {TEXT}")
    for name in (
        "test/a.py",
        "b/tests/c/a.py",
        "config-3.12-x86/a.py",
        "site-packages/a.py",
        "a.so",
        "b.pyc",
    ):
        put(library / name, TEXT)
    put(library / "latin.py", b"\xe9" * 300)
    put(library / "no file.py" / "inside.csv", TEXT)
    for size, is_kept in ((200, False), (201, True), (399_999, True), (400_000, False)):
        put(library / "sizes" / f"{size:06}.txt", "s" * size)
        kept += [f"sizes/{size:06}.txt"] if is_kept else []
    found = list(python_documents())
    assert found[:2] == ["ASSERT", "WHILE"]
    expected = [(library / name).read_text() for name in sorted(kept)]
    assert found[2:] == expected


def test_a_python_without_a_manual(library: Path):
    put(library / "a.py", TEXT)
    assert list(python_documents()) == [TEXT]


def test_empty_lines_and_documents_are_left_out(tmp_path: Path):
    put(tmp_path / "a.jsonl", '{"body": "one"}\n\n  \n{"body": ""}\n{"body": " two "}')
    assert list(read_documents(str(tmp_path / "a.jsonl"), "body")) == ["one", " two "]
    put(tmp_path / "a.txt", " \n")
    put(tmp_path / "b.txt", " \n x")
    assert list(read_documents(str(tmp_path / "a.txt"))) == []
    assert list(read_documents(str(tmp_path / "b.txt"))) == [" \n x"]
    put(tmp_path / "a.json", '{"text": "x"}\nnot json\n')
    documents = read_documents(str(tmp_path / "a.json"))
    assert next(documents) == "x"
    with pytest.raises(ValueError, match=r"a.json:2 is not JSON \(.*\).\n  why: .*\n  try: give plain text"):
        next(documents)

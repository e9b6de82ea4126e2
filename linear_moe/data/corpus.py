"""Corpora: read JSONL or plain text, and make one from what every machine has, the installed Python's own library.

The standard library is some 9 MB of well-written English and code under the PSF licence, which allows this use. It is
read where it lies; nothing of it is distributed.
"""

import ast
import codecs
import json
import shlex
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Not text worth learning: tests and their data, generated tables, what pip installed, bytecode.
_SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings", "ensurepip",
    "turtledemo", "__pycache__", "config", "lib-dynload", "pydoc_data", "__phello__",
}  # fmt: skip
_SUFFIXES = {".py", ".txt", ".rst"}
_LARGEST_FILE = 400_000
COMPRESSED = {
    b"\x1f\x8b": ("gzip -dc", ".gz"),
    b"\x28\xb5\x2f\xfd": ("zstd -dc", ".zst"),
    b"\xfd7zXZ": ("xz -dc", ".xz"),
}
"""First bytes of a file, what unpacks it, and how its name ends."""
_ONE_PER_LINE = "jq -c '.[]' FILE > FILE.jsonl, if the file is one list of objects"


def python_documents() -> Iterator[str]:
    """Documents of the installed Python: its manual's topics, then every source and text file, in a fixed order.

    Deterministic for one Python installation.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    yield from _manual_topics(library / "pydoc_data" / "topics.py")
    for path in sorted(library.rglob("*"), key=lambda p: p.relative_to(library).as_posix()):
        folders = path.relative_to(library).parts[:-1]
        if path.suffix not in _SUFFIXES or any(
            f in _SKIPPED_FOLDERS or f.startswith("config-") for f in folders
        ):
            continue
        if path.is_file() and 200 < path.stat().st_size < _LARGEST_FILE:
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a few files of the library are there to test other encodings


def _manual_topics(path: Path) -> Iterator[str]:
    # pydoc's help() texts: the language reference, as one dictionary literal.
    if not path.exists():
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            yield from (topics[name] for name in sorted(topics))


def check_inputs(paths: Iterable[str]) -> None:
    """Raises ValueError for the first of `paths` that is not a file, cannot be read, or is a compressed one."""
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(
                f"{path} is not a file.\n"
                f"  why: {'it is a folder' if Path(path).is_dir() else 'there is nothing of that name'}; "
                f"inputs are JSONL, or text files of one document each.\n"
                f"  try: --input with the paths of files"
            )
        try:
            with open(path, "rb") as stream:
                start = stream.read(6)
        except OSError as error:
            raise ValueError(
                f"{path} cannot be read: {error.strerror}.\n"
                f"  why: every input is read from its beginning to its end.\n"
                f"  try: --input with files that you may read"
            ) from None
        for magic, (command, suffix) in COMPRESSED.items():
            if start.startswith(magic):
                # Never its own name, which the shell would empty before anything reads it.
                plain = path.removesuffix(suffix) if path.endswith(suffix) else f"{path}.unpacked.jsonl"
                raise ValueError(
                    f"{path} is compressed.\n"
                    f"  why: inputs are text, in JSONL or of one document each.\n"
                    f"  try: {command} {shlex.quote(path)} > {shlex.quote(plain)}"
                )


def read_documents(path: str, key: str = "text", empty: Counter[str] | None = None) -> Iterator[str]:
    """Documents of a file: `.jsonl` and `.json` have one object per line, with the text under `key`; else one document.

    Empty documents are left out, and counted in `empty` by their file. Raises ValueError, naming the line, for one that
    is no such object, or no UTF-8.
    """
    if Path(path).suffix not in {".jsonl", ".json"}:
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise _no_text(path, error) from None
        if text.strip():
            yield text
        elif empty is not None:
            empty[path] += 1
        return
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            text = _text_of(line, key, f"{path}:{number}")
            if text:
                yield text
            elif empty is not None:
                empty[path] += 1


def _text_of(line: bytes, key: str, where: str) -> str:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _no_text(where, error) from None
    except json.JSONDecodeError as error:
        is_spread = line.strip() in (b"[", b"{", b"[{")
        as_text = "give plain text another suffix, .txt, to read the file as one document"
        raise ValueError(
            f"{where} is not JSON ({error.msg}).\n"
            f"  why: a .jsonl file has one JSON object per line, and so has one that ends in .json.\n"
            f"  try: {_ONE_PER_LINE if is_spread else as_text}"
        ) from None
    if not isinstance(value, dict) or not isinstance(value.get(key), str):
        raise ValueError(f"{where} has no text under {key!r}.\n" + _held(value, key))
    try:
        value[key].encode()
    except UnicodeEncodeError as error:  # half of an escaped pair: JSON allows it, and no tokenizer takes it
        raise _no_text(where, error) from None
    text: str = value[key]
    return text


def _held(value: Any, key: str) -> str:
    """Why a line has no text, and what to try."""
    if not isinstance(value, dict):
        why, attempt = f"the line holds a {type(value).__name__}, and each is one object", _ONE_PER_LINE
    elif key in value:
        why = f"it is {json.dumps(value[key])[:40]} there, and a text is a string"
        attempt = "the file without that line, or --json-key NAME, with another field"
    else:
        why = f"the line holds {', '.join(value)}"
        attempt = "--json-key NAME, with the name of the field that holds the text"
    return f"  why: {why}.\n  try: {attempt}"


def _no_text(where: str, error: UnicodeError) -> ValueError:
    assert isinstance(error, UnicodeDecodeError | UnicodeEncodeError)
    if isinstance(error, UnicodeEncodeError):
        attempt = f"the line without {error.object[error.start]!a}, which is half of an escaped pair"
    else:
        is_wide = error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        named = "UTF-16 -t UTF-8" if is_wide else "LATIN1 -t UTF-8, with the encoding that the file has"
        attempt = f"iconv -f {named}; or the file without that line"
    return ValueError(
        f"{where} holds what is no text in UTF-8 ({error.reason}, at place {error.start}).\n"
        f"  why: a model learns from characters.\n"
        f"  try: {attempt}"
    )

"""Answers as JSON lines of a file, written as they are done: a job that is stopped keeps those that it had."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Answers:
    """``FILE.part`` until all are there, then ``FILE``: a file of that name is whole, or an older one.

    Every process of a job enters; the one that ``is_writer`` writes. What is no file on a disk (a pipe,
    ``/dev/stdout``) has no other name, and is written as it is.

    Raises:
        ValueError: a stopped job has left answers in ``FILE.part``; the file cannot be written, or the disk is full.
    """

    def __init__(self, file: str, total: int, *, is_writer: bool) -> None:
        self.path, self.total, self.is_writer, self.count = Path(file), total, is_writer, 0
        self.part = self.path
        self.stream: FileIO | None = None
        # Asked before it is resolved: the pipe behind /dev/stdout has no name of a file.
        if self.path.is_file() or not self.path.exists():
            self.path = self.path.resolve()
            self.part = self.path.with_name(f"{self.path.name}.part")
            self._check_left_over()

    def _check_left_over(self) -> None:
        if not self.part.is_file() or not (count := self.part.read_bytes().count(b"\n")):
            return
        raise ValueError(
            f"{self.part} has the first {count} answers of a job that was stopped\n"
            f"  why: all prompts are answered from the first one on, and would be written over them\n"
            f"  try: rm {shlex.quote(str(self.part))}; or another --output for the prompts behind the first {count}, "
            f"with a --seed that is {count} higher, and each draws as it would have"
        )

    def __enter__(self) -> Self:
        if self.is_writer:
            with self._told():
                self.stream = self.part.open("wb", buffering=0)
        return self

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """The next answers, on the disk when this returns."""
        if self.stream is not None:
            left = "".join(json.dumps(row) + "\n" for row in rows).encode()
            with self._told():
                while left:
                    left = left[self.stream.write(left) :]
        self.count += len(rows)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"{self.part} cannot be written: {error.strerror}\n"
                f"  why: it takes every answer as it is done\n"
                f"  try: --output <a file of yours, on a disk with room>"
            ) from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.stream is None:
            return
        has_part = self.part != self.path
        try:
            with self._told() if kind is None else contextlib.suppress(OSError):
                self.stream.close()  # not before: who reads a pipe would take that for the end
                if has_part and kind is None:
                    os.replace(self.part, self.path)
                    has_part = False
        finally:
            if has_part and self.count:
                print(
                    f"linear_moe: {self.count} of {self.total} answers are in {self.part}, and stay there",
                    file=sys.stderr,
                )
            elif has_part:
                self.part.unlink(missing_ok=True)

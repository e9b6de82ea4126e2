"""What measurements leave: rows of a JSON file that grows, tables in Markdown, a plot where matplotlib is there."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

Row = dict[str, Any]


class Record:
    """Rows of a JSON file, on disk after each."""

    def __init__(self, path: Path, command: str, again: bool = False) -> None:
        """Those of a file, which need not exist; none of them when all is measured ``again``."""
        self.path, self.command = path, command
        self.rows: list[Row] = json.loads(path.read_text())["results"] if path.exists() and not again else []

    def put(self, row: Row, keys: Sequence[str]) -> None:
        """Keep a row, dated, in the place of the one with the same values of ``keys``."""
        others = [other for other in self.rows if [other.get(k) for k in keys] != [row.get(k) for k in keys]]
        self.rows = [*others, {**row, "date": datetime.date.today().isoformat(), "commit": commit()}]
        content = {"command": self.command, "results": self.rows}
        write_text(self.path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """A file that is never there by half; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


@cache
def commit() -> str | None:
    """Of this package, where it lies in a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        shown = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return shown.stdout.strip() or None


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def heading(title: str, command: str, rows: Sequence[Row], *notes: str) -> str:
    """What was measured where, when and how."""
    devices = sorted({row["device"] for row in rows if "device" in row})
    dates = sorted({row["date"] for row in rows})
    installed: dict[str, set[str]] = {}
    for row in rows:
        for name, number in row.get("versions", {}).items():
            installed.setdefault(name, set()).add(number)
    shown = ", ".join(f"{name} {'/'.join(sorted(numbers))}" for name, numbers in installed.items())
    lines = [
        f"{', '.join(devices) or 'nothing measured'}; {', '.join(dates)}; {shown}",
        f"commit {', '.join(sorted({str(row['commit']) for row in rows}))}",
        f"`{command}`",
        *notes,
    ]
    return f"# {title}\n\n" + "\n".join(f"* {line}" for line in lines)


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Numbers to the right, names in the first column."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in body])


def pyplot(path: Path) -> ModuleType | None:
    """What draws without a display; where it is missing, one line that says what is not drawn."""
    try:
        import matplotlib
    except ImportError:
        say(f"{path} is not drawn: matplotlib is not installed")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def say(text: str) -> None:
    """A line for whoever waits."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()

"""Folders that are complete or not there, what a source folder is, and the files of a tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from linear_moe.data.tokenizer import TOKENIZER_FILES
from linear_moe.inference.checkpoint import TRACKER, checkpoint_folder, find_run, is_hugging_face

ORIGIN = "hugging_face"
"""Folder of an imported run with the files of its source that we do not use but give back."""

ORIGIN_FILES = ("config.json", "generation_config.json")

STAMP = "conversion.json"
"""Of an unfinished folder: what it will be."""

type Progress = Callable[[int, int], None]
"""Called with bytes done and bytes of all."""


def silent(done: int, total: int) -> None:
    """A :data:`Progress` that shows nothing."""


def refuse_existing(target: Path) -> None:
    """``ValueError`` when a target is already there, or something else where its unfinished folder would be."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(
            f"{target} exists\n  why: nothing is overwritten\n  try: another name, or remove it first"
        )
    part = part_of(target)
    if part.exists() and not (part / STAMP).is_file() and (not part.is_dir() or any(part.iterdir())):
        raise ValueError(
            f"{part} exists, and no conversion has left it\n"
            f"  why: {target.name} has that name until it is complete\n"
            f"  try: another name for {target.name}, or remove it first"
        )


def check_room(target: Path, needed: int) -> None:
    """``ValueError`` when the disk of a target that does not exist yet has too little room."""
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(
            f"cannot write to {parent}\n  why: {target} would be made there\n  try: a folder of yours"
        )
    free = shutil.disk_usage(parent).free + _size_of(part_of(target))
    if free < needed:
        raise ValueError(
            f"{parent} has {free / 1e9:.1f} GB free, {target.name} needs {needed / 1e9:.1f} GB\n"
            f"  why: the weights are written once more\n"
            f"  try: a larger disk"
        )


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0


def part_of(target: Path) -> Path:
    """Where a folder is written until it is complete."""
    return target.with_name(target.name + ".part")


def begin(target: Path, task: dict[str, Any]) -> Path:
    """The unfinished folder, with what an interrupted conversion of the same task left in it."""
    part, text = part_of(target), json.dumps(task, sort_keys=True)
    stamp = part / STAMP
    if part.exists() and not (stamp.is_file() and stamp.read_text() == text):
        shutil.rmtree(part)
    part.mkdir(parents=True, exist_ok=True)
    stamp.write_text(text)
    return part


def finish(part: Path, target: Path) -> None:
    """The folder is complete: give it its name."""
    (part / STAMP).unlink()
    if target.exists():
        target.rmdir()  # empty, as refuse_existing saw
    part.replace(target)


def fingerprint(paths: list[Path]) -> str:
    """Of files, by name, size and time: another file is another task."""
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(set(paths))]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def run_and_iteration(source: Path, step: int | None = None) -> tuple[Path, Path, int]:
    """Run folder, checkpoint folder and step of what may be a run, its ``checkpoint/``, or one iteration in that.

    Raises:
        ValueError: none of these, no such step, or another one than that of the iteration.
    """
    source = source.absolute()
    if re.fullmatch(r"iter_\d+", source.name) and source.parent.name == "checkpoint":
        run, step = find_run(source, step)
    elif source.name == "checkpoint" and (source / TRACKER).exists():
        run = source.parent
    else:
        run = source
    if not (run / "config.json").is_file():
        raise ValueError(
            f"{source} is neither a run, nor the checkpoint folder of one, nor an iteration in it\n"
            f"  why: there is no {run / 'config.json'}, which says what the model is\n"
            f"  try: the folder that holds config.json and checkpoint/"
        )
    if is_hugging_face(run):
        raise ValueError(
            f"{source} is a folder of Hugging Face's already\n"
            f"  why: export makes one of a run\n"
            f"  try: the folder as it is; or a run, with config.json and checkpoint/"
        )
    folder, step = checkpoint_folder(run, step)
    return run, folder, step

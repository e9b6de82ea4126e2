"""A checkpoint that cannot be loaded, in three lines: torch says it once for every rank, in a hundred."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

_TRACKER = "latest_checkpointed_iteration.txt"


def cannot_be_loaded(args: argparse.Namespace, error: CheckpointException) -> ValueError:
    """What to tell a person whose run cannot go on from, or start from, its checkpoint."""
    trackers = [Path(folder) / _TRACKER for folder in (args.load, args.pretrained_checkpoint) if folder]
    tracker = next((path for path in trackers if path.exists()), trackers[0])
    step = tracker.read_text().strip() if tracker.exists() else ""
    whole = (path.parent.name for path in tracker.parent.glob("iter_*/.metadata"))
    others = sorted(int(name.removeprefix("iter_")) for name in whole if name != f"iter_{step:0>7}")
    cause = next((failure[0] for failure in error.failures.values()), error)
    words = str(cause).strip().splitlines() or [""]
    return ValueError(
        f"step {step} of {tracker.parent} cannot be loaded: {type(cause).__name__}: {words[0][:200]}\n"
        f"  why: a file of it is missing, cut short or changed (a full disk, an interrupted copy), or it is of another "
        f"model or optimizer\n"
        f"  try: {f'echo {others[-1]} > {tracker}, an earlier step' if others else 'a copy of it'}"
        f", or another RUN_NAME"
    )

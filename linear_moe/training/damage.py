"""What ends a run, in three lines: a checkpoint that cannot be loaded, a step that is not a number."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

_TRACKER = "latest_checkpointed_iteration.txt"


def not_a_number(step: int, what: str, value: float) -> ValueError:
    """What to tell a person whose weights are spoiled by a step; ``what`` is the value that shows it."""
    if step == 1:
        return ValueError(
            f"step 1 has a {what} of {value}, before anything was learned\n"
            f"  why: the weights that it started from, or what a layer computes (gates of a mixer, a sum too large for "
            f"PR), are not finite\n"
            f"  try: PR=fp32, LAYER_TYPE_LIST=N to see whether it is the mixer, and docs/new_mixer.md for one of yours"
        )
    return ValueError(
        f"step {step} has a {what} of {value}, and the weights after it are of no use\n"
        f"  why: training diverged, most often by a learning rate that is too high or a warm-up that is too short\n"
        f"  try: a lower LR, from the last step that was saved (the same command goes on from there, this step was not "
        f"saved) or under another RUN_NAME"
    )


def cannot_be_loaded(args: argparse.Namespace, error: CheckpointException) -> ValueError:
    """The same where a run cannot go on from, or start from, its checkpoint: torch says it in a hundred lines."""
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
        f"  try: {f'echo {others[-1]} > {shlex.quote(str(tracker))}, an earlier step' if others else 'a copy of it'}"
        f", or another RUN_NAME"
    )

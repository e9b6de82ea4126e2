"""All processes of a run have the same command line: nodes that were started with other variables are refused."""

from __future__ import annotations

import torch.distributed as dist

from linear_moe.model.families import flags_of


def check_same_arguments(argv: list[str]) -> None:
    """Compare the command line with that of the first process; every process takes part.

    Raises:
        ValueError: some differ. Training would hang, crash in a collective, or go on with, say, two learning rates.
    """
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    # Of a path the name alone: nodes may have a disk in another place, or their own copy of the data.
    dist.all_gather_object(everyone, [word.rsplit("/", 1)[-1] for word in argv])
    other = next((rank for rank, words in enumerate(everyone) if words != everyone[0]), None)
    if other is None:
        return
    ours, theirs = (flags_of(everyone[rank]) for rank in (0, other))
    names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    shown = "; ".join(
        f"{name}: {ours.get(name, 'not set')} -> {theirs.get(name, 'not set')}" for name in names
    )
    raise ValueError(
        f"process {other} was started with other variables than process 0: {shown[:400] or 'the order of flags'}\n"
        f"  why: all of them train one model, by one schedule\n"
        f"  try: the same script and variables on every node (NODE_RANK alone differs)"
    )

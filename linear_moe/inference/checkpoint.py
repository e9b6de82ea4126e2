"""Weights of a run's checkpoints: where they are, which steps there are, and one of them into a model, strictly.

RUN/checkpoint/latest_checkpointed_iteration.txt    the last complete step
RUN/checkpoint/iter_0000100/                        a step, in Megatron's torch_dist format
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException

TRACKER = "latest_checkpointed_iteration.txt"


def find_run(path: Path, step: int | None = None) -> tuple[Path, int | None]:
    """The run that ``path`` is or belongs to, and the step that it names: a run, its checkpoints or one of them.

    Raises:
        ValueError: a model in Hugging Face's format, or two different steps are asked for.
    """
    path = path.resolve()
    if re.fullmatch(r"iter_\d+", path.name):
        named = int(path.name.removeprefix("iter_"))
        if step not in (None, named):
            raise ValueError(
                f"{path} is step {named}, and step {step} is asked for\n"
                f"  why: a folder of one iteration has no other\n"
                f"  try: {path.parents[1]} with --step {step}"
            )
        return path.parents[1], named
    if path.name == "checkpoint" and not (path / "config.json").exists():
        return path.parent, step
    if is_hugging_face(path):
        raise ValueError(
            f"{path} is a model in Hugging Face's format\n"
            f"  why: a run of linear_moe is loaded here\n"
            f"  try: python tools/convert.py import --hf {shlex.quote(str(path))} --save <folder>, and that folder"
        )
    return path, step


def is_hugging_face(path: Path) -> bool:
    """Whether a folder's ``config.json`` is one of ``transformers``."""
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def saved_steps(run: Path) -> list[int]:
    """Steps of which there is a folder, ascending; whether one is complete shows on loading."""
    names = [path.name for path in (run / "checkpoint").glob("iter_*") if path.is_dir()]
    return sorted(int(name.removeprefix("iter_")) for name in names if re.fullmatch(r"iter_\d+", name))


def checkpoint_folder(run: Path, step: int | None = None) -> tuple[Path, int]:
    """Folder and iteration of the checkpoint of ``step``, or of the last complete one.

    Raises:
        ValueError: the run has no checkpoint, or not this one.
    """
    steps, latest = saved_steps(run), _latest(run)
    if step is None and latest is None:
        raise ValueError(
            f"{run} has no checkpoint\n"
            f"  why: {run / 'checkpoint' / TRACKER} names the last complete one, and is not there\n"
            f"  try: " + (_other_step(steps) if steps else "train it until its first save (SAVE_INTERVAL)")
        )
    wanted = latest if step is None else step
    if wanted not in steps:
        raise ValueError(
            f"{run} has no checkpoint of step {wanted}\n"
            f"  why: the steps in {run / 'checkpoint'} are {', '.join(map(str, steps)) or 'none'}\n"
            f"  try: {_other_step(steps) if steps else 'train it again'}"
        )
    assert wanted is not None
    return run / "checkpoint" / f"iter_{wanted:07d}", wanted


def load_weights(model: MegatronModule, folder: Path, dp_cp_group: dist.ProcessGroup) -> None:
    """Fill ``model`` from a checkpoint saved under any layout; every weight of both must have its partner.

    Raises:
        ValueError: the checkpoint is damaged, or of another model.
    """
    try:
        metadata = dist_checkpointing.load_content_metadata(str(folder)) or {}
        wanted = {"model": model.sharded_state_dict(metadata=metadata | {"dp_cp_group": dp_cp_group})}
        for tensor in nested_values(wanted):
            if isinstance(tensor, ShardedTensor):
                tensor.allow_shape_mismatch = (
                    False  # Megatron lets an embedding have other rows than was saved
                )
        state, unused, absent = dist_checkpointing.load(wanted, str(folder), strict=StrictHandling.RETURN_ALL)
    except (Exception, CheckpointException) as error:  # of pickle, zip, files or Megatron: by what is wrong
        raise ValueError(
            f"{folder} cannot be loaded: {_cause(error)}\n"
            f"  why: a file of it is missing, cut short or changed (a full disk, an interrupted copy), or config.json "
            f"does not describe its model\n"
            f"  try: {_other_step([s for s in saved_steps(folder.parents[1]) if folder.name != f'iter_{s:07d}'])}"
        ) from error
    parts = {name for name, _ in model.named_children()}
    unused = {key for key in unused if key.split(".")[0] in parts and not key.endswith("_extra_state")}
    absent = {key for key in absent if not key.endswith("_extra_state")}
    if unused or absent:
        raise ValueError(
            f"{folder} is of another model: it lacks {_some(absent)}, and the model lacks {_some(unused)}\n"
            f"  why: config.json of the run describes the model to build, and the two must match\n"
            f"  try: the run folder as it was trained, with the linear_moe that trained it"
        )
    model.load_state_dict(state["model"], strict=True)


def _latest(run: Path) -> int | None:
    try:
        return int((run / "checkpoint" / TRACKER).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # torch's: not an Exception, holds one for every rank
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].removesuffix(": ")


def _other_step(steps: list[int]) -> str:
    return f"--step {steps[-1]}" if steps else "train it again; it has no other checkpoint"


def _some(keys: set[str], most: int = 3) -> str:
    shown = ", ".join(sorted(keys)[:most]) or "nothing"
    return f"{shown} and {len(keys) - most} more" if len(keys) > most else shown

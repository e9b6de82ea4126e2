"""What is told of a checkpoint that cannot be loaded: which step, why, and which other one is there."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from linear_moe.training.damage import cannot_be_loaded, not_a_number
from tests.training.tiny import ARGUMENTS


def told(load: Path | None, pretrained: Path | None, error: BaseException | None = None) -> str:
    args = Namespace(load=load and str(load), pretrained_checkpoint=pretrained and str(pretrained))
    failures = {3: (error or ValueError("two\nlines"), None)}
    return str(cannot_be_loaded(args, CheckpointException("load", failures)))  # type: ignore[arg-type]


def saved(folder: Path, *steps: int, latest: int | None) -> Path:
    for step in steps:
        (folder / f"iter_{step:07d}").mkdir(parents=True)
        (folder / f"iter_{step:07d}" / ".metadata").touch()
    if latest is not None:
        (folder / "latest_checkpointed_iteration.txt").write_text(f"{latest}\n")
    return folder


def test_the_first_step_has_not_diverged():
    """No learning rate is to blame before a weight has changed."""
    first, later = (str(not_a_number(step, "loss", float("nan"))) for step in (1, 2))
    assert (
        first.startswith("step 1 has a loss of nan, before anything was learned\n  why: ")
        and "LR" not in first
    )
    assert "learning rate that is too high" in later


def test_the_latest_of_the_other_whole_steps_is_named(tmp_path: Path):
    folder = saved(tmp_path / "my run", 2, 30, 100, 9, latest=100)
    (folder / "iter_0000050").mkdir()  # a save that was cut off
    tracker = folder / "latest_checkpointed_iteration.txt"
    text = told(folder, None)
    assert text.startswith(
        f"step 100 of {folder} cannot be loaded: ValueError: two\n  why: a file of it is missing"
    )
    assert text.endswith(f"\n  try: echo 30 > '{tracker}', an earlier step, or another RUN_NAME")


@pytest.mark.parametrize("load", [False, True], ids=["no run yet", "an empty run"])
def test_the_weights_to_start_from_where_the_run_has_none(tmp_path: Path, load: bool):
    folder = saved(tmp_path / "start", 7, latest=7)
    text = told(tmp_path / "run" if load else None, folder)
    assert text.startswith(f"step 7 of {folder} cannot be loaded")
    assert text.endswith("\n  try: a copy of it, or another RUN_NAME")


def test_errors_without_words_and_folders_without_a_tracker(tmp_path: Path):
    folder = saved(tmp_path / "start", 7, latest=None)
    assert told(folder, None, KeyError()).startswith(f"step  of {folder} cannot be loaded: KeyError: \n")
    assert len(told(folder, None, ValueError("x" * 900)).splitlines()[0]) < 350


def told_by_main(rank: int, world: int, argv: list[str], is_loaded: bool) -> str:
    """What a run says whose ``pretrain()`` fails with torch's error, after or before it asks for data."""
    from linear_moe.training import pretrain

    def provide(num_samples: list[int], vp_stage: int | None) -> None:
        """No data."""

    def fails(config: object, datasets: Callable, *others: object) -> None:
        if is_loaded:
            datasets([1, 1, 1])
        raise CheckpointException("disk", {})

    provide.is_distributed = True  # type: ignore[attr-defined]
    with patch.multiple(pretrain, pretrain=fails, train_valid_test_datasets=provide):
        try:
            pretrain.main(argv)
        except (ValueError, CheckpointException) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def test_a_save_that_fails_is_no_checkpoint_that_cannot_be_loaded(gloo, tmp_path: Path):
    """Nor has a run begun whose checkpoint could not be loaded: it writes no config.json."""
    load = saved(tmp_path / "run" / "checkpoint", 7, latest=7)
    argv = [
        *ARGUMENTS,
        "--layer-kinds",
        "gla,gla,gla,gla",
        "--load",
        str(load),
        "--run-dir",
        str(load.parent),
    ]
    (told,) = gloo(1, told_by_main, argv, False)
    assert told.startswith(f"ValueError: step 7 of {load} cannot be loaded")
    assert not (load.parent / "config.json").exists()
    (told,) = gloo(1, told_by_main, argv, True)
    assert told.startswith("CheckpointException: ") and "cannot be loaded" not in told
    assert (load.parent / "config.json").exists()

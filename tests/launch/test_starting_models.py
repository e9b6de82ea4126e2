"""The model that a run starts from: what of it need not be said again, and what is said nevertheless."""

import json
import shutil
from pathlib import Path

import pytest

from linear_moe.launch import __main__ as launcher
from linear_moe.launch.errors import PreflightError
from linear_moe.launch.instructions import keep_tokenizer
from linear_moe.launch.megatron_args import training_arguments
from linear_moe.launch.plan import RunPlan
from linear_moe.launch.preflight import preflight
from linear_moe.launch.resume import architecture
from linear_moe.model.families import Llama3Rope
from tests.data.token_files import write_tokenizer
from tests.launch.plans import SMALL, make_plan

UNSET = {"MODEL_SIZE": "", "LA_MODULE": "", "LAYER_TYPE_LIST": ""}


def saved(run: Path, family: str = "qwen2", **variables: str) -> RunPlan:
    """The plan of a run that has saved a checkpoint there."""
    plan = make_plan(family=family, **variables)
    (run / "checkpoint" / "iter_0000005").mkdir(parents=True)
    (run / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("5")
    tokenizer = {"tokenizer_type": "NullTokenizer", "tokenizer_model": None}
    if plan.tokenizer is not None:
        keep_tokenizer(run, Path(plan.tokenizer.path), None)
        tokenizer = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": plan.tokenizer.path}
    config = {"architecture": architecture(plan) | {"model_size": plan.size_name}, "tokenizer": tokenizer}
    (run / "config.json").write_text(json.dumps(config | {"arguments": training_arguments(plan)}))
    return plan


def from_run(path: Path, family: str = "qwen2", **variables: str) -> RunPlan:
    given = {**SMALL, **UNSET, "RUN_NAME": "next", "PRETRAIN_CHECKPOINT_PATH": str(path), **variables}
    plan = launcher._plan_pretraining(given, family, 0)
    preflight(plan)
    return plan


@pytest.mark.parametrize("inside", ["", "checkpoint"], ids=["run", "its checkpoint"])
def test_a_run_that_has_moved_brings_its_tokenizer(tmp_path: Path, data: dict[str, str], inside: str):
    trained = saved(tmp_path / "old", TOKENIZER=data["TOKENIZER"], EXTRA_VOCAB_SIZE="200")
    found = from_run(tmp_path / "old" / inside)
    assert found.tokenizer is not None and found.tokenizer.path == data["TOKENIZER"]
    shutil.rmtree(data["TOKENIZER"])
    found = from_run(tmp_path / "old" / inside)
    assert found.tokenizer is not None and found.tokenizer.path == str(tmp_path / "old" / "tokenizer")
    assert found.padded_vocab_size == trained.padded_vocab_size == 512


def test_the_rows_are_those_of_the_checkpoint_with_another_tokenizer(tmp_path: Path, data: dict[str, str]):
    trained = saved(tmp_path / "old", TOKENIZER=data["TOKENIZER"], EXTRA_VOCAB_SIZE="212")
    other = write_tokenizer(tmp_path / "other", 340)
    assert from_run(tmp_path / "old").padded_vocab_size == trained.padded_vocab_size == 512
    assert from_run(tmp_path / "old", TOKENIZER=other.path).padded_vocab_size == 512


@pytest.mark.parametrize("given", [{}, {"TOKENIZER": "null"}], ids=["unset", "null"])
def test_a_run_without_text_keeps_its_numbers(tmp_path: Path, given: dict[str, str]):
    trained = saved(tmp_path / "old", VOCAB_SIZE="500", EXTRA_VOCAB_SIZE="100")
    found = from_run(tmp_path / "old", **given)
    assert (found.vocab_size, found.padded_vocab_size) == (500, trained.padded_vocab_size) == (500, 640)


def test_mixers_of_yours_are_found_where_they_were(tmp_path: Path):
    saved(tmp_path / "old", MIXER_MODULES="tests.launch.plans")
    found = from_run(tmp_path / "old")
    assert found.settings.mixer_modules == "tests.launch.plans"
    assert "MIXER_MODULES" in found.from_checkpoint
    mine = from_run(tmp_path / "old", MIXER_MODULES="tests.launch.conftest")
    assert (
        mine.settings.mixer_modules == "tests.launch.conftest" and "MIXER_MODULES" not in mine.from_checkpoint
    )


def test_a_size_that_is_named_is_that_of_the_table(tmp_path: Path):
    """Not the checkpoint's, which has changed it: the two differ, and nothing is guessed."""
    saved(tmp_path / "old", EXTRA_ARGS="--moe-ffn-hidden-size 128")
    assert from_run(tmp_path / "old").size.moe_ffn_hidden_size == 128
    with pytest.raises(PreflightError, match="moe_ffn_hidden_size: 128 -> 64"):
        from_run(tmp_path / "old", MODEL_SIZE="tiny")
    changed = from_run(tmp_path / "old", MODEL_SIZE="tiny", EXTRA_ARGS="--moe-ffn-hidden-size 128")
    assert changed.size.moe_ffn_hidden_size == 128 and "MODEL_SIZE" not in changed.from_checkpoint


def test_of_a_flag_that_a_run_had_twice_the_last_counts(tmp_path: Path):
    """As for Megatron: that of EXTRA_ARGS, behind the family's own."""
    saved(tmp_path / "old", "llama3", MODEL_SIZE="1B", EXTRA_ARGS="--rope-scaling-factor 4")
    found = from_run(tmp_path / "old", "llama3", SEQ_LEN="64")
    assert found.size.rope_scaling == Llama3Rope(factor=4.0)


def test_a_run_that_goes_on_needs_its_start_no_more(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Its model is read from its own folder, also one that is ~/ in quotes; a new run without the start is refused."""
    saved(tmp_path / "old", LA_MODULE="gla", LAYER_TYPE_LIST="LLLN")
    first = from_run(tmp_path / "old", OUTPUT_BASEPATH=str(tmp_path))
    saved(tmp_path / "next", LA_MODULE="gla", LAYER_TYPE_LIST="LLLN")
    shutil.rmtree(tmp_path / "old")
    again = from_run(tmp_path / "old", OUTPUT_BASEPATH=str(tmp_path))
    assert architecture(again) == architecture(first) and again.run_dir == first.run_dir
    assert f"{tmp_path / 'old'} is gone: {tmp_path / 'next'} goes on from its own" in capsys.readouterr().err
    monkeypatch.setenv("HOME", str(tmp_path))
    at_home = from_run(Path("~/old"), OUTPUT_BASEPATH="~/")
    assert (at_home.run_dir, architecture(at_home)) == (first.run_dir, architecture(first))
    with pytest.raises(PreflightError, match=r"PRETRAIN_CHECKPOINT_PATH=.*/old does not exist"):
        from_run(tmp_path / "old", OUTPUT_BASEPATH=str(tmp_path), RUN_NAME="new")

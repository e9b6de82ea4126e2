"""A run that has saved steps goes on without the checkpoint that it started from; a new one is refused."""

import json
import shutil
from pathlib import Path

import pytest

from linear_moe.launch.finetune import plan_finetune
from linear_moe.launch.header import header
from linear_moe.launch.instructions import keep_tokenizer
from linear_moe.launch.resume import architecture
from tests.finetune.chat import write_lines
from tests.finetune.test_finetune_launch import files, flags, message, plan, saved_run  # noqa: F401 (a fixture)
from tests.launch.plans import make_plan

UNSAID = {"MODEL_SIZE": "", "TOKENIZER": "", "RUN_NAME": "mine"}


def begun(files: Path, base: Path, tokenizer: str, **given: str) -> tuple[dict[str, str], Path]:  # noqa: F811
    """Variables of a run that has saved steps, as the launcher and the trainer leave it, and where it started."""
    start = base / "start"
    trained = make_plan(
        family="qwen2", LA_MODULE="gla,mamba2", LAYER_TYPE_LIST="12N", TOKENIZER=str(files / tokenizer),
        EXTRA_VOCAB_SIZE="300", EXTRA_ARGS="--num-layers 3 --gla-gate-rank 8",
    )  # fmt: skip
    saved_run(start, trained, start / "tokenizer")
    keep_tokenizer(start, files / tokenizer, None)
    variables = UNSAID | given | {"PRETRAIN_CHECKPOINT_PATH": str(start)}
    run = plan(files, base, **variables)
    assert run.instructions is not None and run.instructions.train is not None
    keep_tokenizer(base / "mine", start / "tokenizer", run.instructions.train.report.template)
    saved_run(base / "mine", run, base / "mine" / "tokenizer")
    return variables, start


@pytest.mark.parametrize("tokenizer", ["tokenizer", "bare"])
def test_a_run_goes_on_from_its_own_checkpoint(files, tmp_path, tokenizer):  # noqa: F811
    """Also where the tokenizer that it keeps has the chat template that was learned, and the first one had none."""
    lines = [{"instruction": f"Name {i}.", "output": f"{i} {i}"} for i in range(12)]
    samples = {"DATASET_PATH": write_lines(tmp_path / "lines.jsonl", lines)}
    variables, start = begun(files, tmp_path, tokenizer, **samples, EPOCHS="2")
    before = plan(files, tmp_path, **variables)
    shutil.rmtree(start)
    base = {"SEQ_LEN": "64", "GLOBAL_BATCH_SIZE": "4", "BATCH_SIZE": "2", "OUTPUT_BASEPATH": str(tmp_path)}
    for given in (variables, {**variables, "PRETRAIN_CHECKPOINT_PATH": ""}):
        said: list[str] = []
        after = plan_finetune(base | given, "qwen2", 0, said.append)
        assert (
            architecture(after) == architecture(before)
            and after.settings.iterations == before.settings.iterations
        )
        own = f"{tmp_path / 'mine'} goes on from its own checkpoint."
        assert [line.endswith(own) for line in said if line.startswith("PRETRAIN_CHECKPOINT_PATH")] == [True]
        was, now = flags(before), flags(after)
        assert now["--gla-gate-rank"] == "8" and now["--load"] == was["--load"]
        changed = {name for name in was.keys() | now.keys() if was.get(name) != now.get(name)}
        assert changed <= {"--pretrained-checkpoint"}
        assert "resumed at step 5" in header(after) and "changed since" not in header(after)
    other = write_lines(tmp_path / "other.jsonl", lines[:-1])
    assert "would go on with other samples" in message(files, tmp_path, **variables | {"DATASET_PATH": other})


def test_samples_of_another_name_that_cannot_be_compared_are_other_ones(files, tmp_path):  # noqa: F811
    trained = plan(files, tmp_path, RUN_NAME="mine")
    run = saved_run(tmp_path / "mine", trained, files / "tokenizer")
    config = json.loads((run / "config.json").read_text())
    place = config["arguments"].index("--instruction-data") + 1
    config["arguments"][place] += "0"
    (run / "config.json").write_text(json.dumps(config))
    assert "would go on with other samples" in message(files, tmp_path, RUN_NAME="mine")


def test_a_new_run_needs_its_start(files, tmp_path):  # noqa: F811
    """Also one of a name that has saved nothing; without a name, the run that goes on has to be named."""
    gone = {"PRETRAIN_CHECKPOINT_PATH": str(tmp_path / "gone")}
    (tmp_path / "mine").mkdir()
    for name in ("", "mine"):
        what, why, instead = message(files, tmp_path, RUN_NAME=name, **gone).splitlines()
        assert what == f"PRETRAIN_CHECKPOINT_PATH={tmp_path / 'gone'} does not exist."
        assert why.startswith("  why: a new run starts from the weights there;")
        named = f"  try: RUN_NAME=<run in {tmp_path}> to go on with one that started there, or a run folder"
        assert instead.startswith("  try: a run folder" if name else named)

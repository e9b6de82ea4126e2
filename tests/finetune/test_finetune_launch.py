"""A finetuning run before it starts: the model of its checkpoint, its steps, its mistakes; and one by the script."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from linear_moe.data.instructions.template import PLAIN_TEMPLATE
from linear_moe.launch.environment import RunSettings, read_environment, variables
from linear_moe.launch.finetune import DEFAULTS, plan_finetune
from linear_moe.launch.header import header
from linear_moe.launch.instructions import FinetuneSettings, keep_tokenizer
from linear_moe.launch.megatron_args import training_arguments
from linear_moe.launch.plan import RunPlan
from linear_moe.launch.resume import architecture
from linear_moe.launch.starting_model import SCRIPTS
from linear_moe.model.families import FAMILIES, megatron_arguments, size_of
from tests.finetune.chat import chat_tokenizer, mixed_messages, toy_messages, write_lines
from tests.launch.plans import EXAMPLES, make_plan
from tests.training.tiny import metrics, records

EMPTY_ANSWER = {"instruction": "Say nothing.", "output": ""}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tokenizer``, ``bare`` (without a chat template), ``toy.jsonl``, ``mixed.jsonl``, ``broken.jsonl``."""
    folder = tmp_path_factory.mktemp("files")
    chat_tokenizer(folder / "tokenizer")
    chat_tokenizer(folder / "bare", eos="<|endoftext|>", template=None)
    write_lines(folder / "toy.jsonl", toy_messages())
    write_lines(folder / "mixed.jsonl", [*mixed_messages(40), EMPTY_ANSWER])
    write_lines(folder / "broken.jsonl", [*toy_messages(), "{"])
    return folder


def plan(files: Path, output: Path, family: str = "qwen2", **given: str) -> RunPlan:
    """A tiny model on mixed messages, unless ``given`` says otherwise; an empty variable is not set."""
    base = {"MODEL_SIZE": "tiny", "TOKENIZER": str(files / "tokenizer"), "PRETRAIN_CHECKPOINT_PATH": "none"}
    base |= {"SEQ_LEN": "64", "GLOBAL_BATCH_SIZE": "4", "BATCH_SIZE": "2", "OUTPUT_BASEPATH": str(output)}
    base |= {"DATASET_PATH": str(files / "mixed.jsonl")}
    return plan_finetune(base | given, family, 0, lambda line: None)


def flags(of: RunPlan) -> dict[str, str]:
    words = training_arguments(of)
    return {word: after for word, after in zip(words, [*words[1:], ""]) if word.startswith("--")}


def test_steps_follow_from_the_packs(files, tmp_path):
    """Whole epochs, from the samples alone; evaluation and checkpoints at their ends, 3 % warm-up."""
    found = plan(files, tmp_path, EPOCHS="2", VALID_DATASET_PATH=str(files / "toy.jsonl"))
    instructions = found.instructions
    assert (
        instructions is not None and instructions.packs is not None and instructions.valid_packs is not None
    )
    each = instructions.packs.steps_per_epoch
    assert each == -(-instructions.packs.num_packs // 4) > 2
    s = found.settings
    assert (s.iterations, s.warmup_iterations, s.eval_interval, s.save_interval) == (2 * each, 1, each, each)
    assert s.eval_iters == instructions.valid_packs.steps_per_epoch >= 1
    assert plan(files, tmp_path, EPOCHS="0.5").settings.iterations == -(-each // 2)
    assert (
        plan(files, tmp_path).settings.iterations == 3 * each
        and plan(files, tmp_path).settings.eval_iters == 0
    )
    assert plan(files, tmp_path, EVAL_ITERS="5").settings.eval_iters == 0, "there is nothing to evaluate on"
    assert plan(files, tmp_path, TRAIN_TOKENS="2560", WARMUP_TOKENS="512").settings.iterations == 10
    assert plan(files, tmp_path, TRAIN_ITERS="7", WARMUP_ITERS="2").settings.warmup_iterations == 2
    assert plan(files, tmp_path, TRAIN_ITERS="1").settings.warmup_iterations == 0
    assert plan(files, tmp_path, PACK="false").settings.iterations > 3 * each


def test_the_command_line(files, tmp_path):
    found = plan(files, tmp_path, VALID_DATASET_PATH=str(files / "toy.jsonl"), PACK="false")
    given = flags(found)
    flags_alone = {"--dataloader-inter-document-masking", "--no-instruction-packing"}
    assert flags_alone | {"--log-validation-ppl-to-tensorboard"} <= given.keys()
    assert not {"--data-path", "--mock-data"} & given.keys()
    for flag in ("--instruction-data", "--valid-instruction-data"):
        assert (Path(given[flag]) / "tokens.npy").is_file()
    assert given["--tokenizer-model"] == str(found.run_dir / "tokenizer")
    assert found.run_name == "finetune-qwen2-tiny-gated_deltanet-L"


def test_the_header_counts_samples(files, tmp_path):
    text = header(plan(files, tmp_path, EPOCHS="2"))
    assert re.search(r"schedule +\d+ steps = 2 epoch\(s\) of \d+ = ", text)
    assert re.search(r"data +\d+ samples in \d+ sequences, \d+ of \d+ tokens learned, tokenizer ", text)
    assert "mixed.jsonl: 1 of 41 samples have an empty answer and are left out." in text
    assert re.search(r"mixed.jsonl: \d+ of 41 samples are longer than SEQ_LEN=64 and are left out", text)
    cut = header(plan(files, tmp_path, OVER_LONG="truncate"))
    assert re.search(r"mixed.jsonl: \d+ of 41 samples are longer than SEQ_LEN=64.* cut, and 0 left out", cut)
    short = header(plan(files, tmp_path, DATASET_PATH=str(files / "toy.jsonl"), GLOBAL_BATCH_SIZE="64"))
    assert "fewer than GLOBAL_BATCH_SIZE=64: the rest of every step is empty." in short


def saved_run(output: Path, of: RunPlan, tokenizer: Path | None) -> Path:
    """A run folder as training leaves it, without weights."""
    (output / "checkpoint" / "iter_0000005").mkdir(parents=True)
    (output / "checkpoint" / "latest_checkpointed_iteration.txt").write_text("5")
    config = {
        "architecture": architecture(of) | {"family": of.family.name, "model_size": of.size_name},
        "arguments": training_arguments(of),
        "tokenizer": {"tokenizer_type": "NullTokenizer" if tokenizer is None else "HuggingFaceTokenizer"}
        | {"tokenizer_model": None if tokenizer is None else str(tokenizer)},
    }
    (output / "config.json").write_text(json.dumps(config))
    return output


@pytest.mark.parametrize("family,size", [("qwen2", "tiny"), ("deepseek_v2", "tiny"), ("llama3", "tiny")])
def test_the_model_is_that_of_the_checkpoint(files, tmp_path, family, size):
    """Size with its changes, pattern of several mixers, their options, tokenizer, rows of the embedding."""
    trained = make_plan(
        family=family, MODEL_SIZE=size, LA_MODULE="gla,mamba2", LAYER_TYPE_LIST="12N", TOKENIZER=str(files / "bare"),
        EXTRA_VOCAB_SIZE="300", EXTRA_ARGS="--num-layers 6 --ffn-hidden-size 192 --gla-gate-rank 8",
    )  # fmt: skip
    run = saved_run(tmp_path / "run", trained, files / "tokenizer")
    unsaid = {"MODEL_SIZE": "", "TOKENIZER": "", "PRETRAIN_CHECKPOINT_PATH": str(run)}
    found = plan(files, tmp_path, family, EXTRA_ARGS="--weight-decay 0", **unsaid)
    assert architecture(found) == architecture(trained)
    assert found.padded_vocab_size == trained.padded_vocab_size > 384
    given, before = flags(found), flags(trained)
    for flag in megatron_arguments(trained.family, trained.size):
        assert given.get(flag) == before.get(flag), flag
    assert given["--gla-gate-rank"] == "8" and given["--weight-decay"] == "0"
    assert given["--pretrained-checkpoint"] == str(run / "checkpoint")
    assert found.tokenizer is not None and found.tokenizer.path == str(files / "tokenizer")
    moved = saved_run(tmp_path / "moved", trained, Path("/absent"))
    keep_tokenizer(moved, files / "tokenizer", None)
    found = plan(files, tmp_path, family, **unsaid | {"PRETRAIN_CHECKPOINT_PATH": str(moved)})
    assert found.tokenizer is not None and found.tokenizer.path == str(moved / "tokenizer")


@pytest.mark.parametrize("family,size", [(f, s) for f in FAMILIES for s in FAMILIES[f].sizes])
def test_a_size_is_read_back_from_its_flags(family: str, size: str):
    arguments = megatron_arguments(FAMILIES[family], FAMILIES[family].sizes[size])
    found = size_of(arguments)
    assert found is not None and megatron_arguments(FAMILIES[family], found) == arguments


def message(files: Path, output: Path, family: str = "qwen2", **given: str) -> str:
    with pytest.raises(ValueError) as error:
        plan(files, output, family, **given)
    return str(error.value)


def test_mistakes(files, tmp_path):
    def first(**given: str) -> str:
        return message(files, tmp_path / "output", **given).partition("\n")[0]

    assert first(DATASET_PATH="") == "DATASET_PATH is not set."
    many = " ".join(f"part_{i}_conversations.jsonl" for i in range(99))  # longer than a name of a file may be
    assert first(DATASET_PATH=many) == "part_0_conversations.jsonl cannot be read: No such file or directory"
    assert first(DATASET_PATH="absent.jsonl") == "absent.jsonl cannot be read: No such file or directory"
    assert first(DATASET_PATH=str(files / "broken.jsonl")).startswith(
        f"{files / 'broken.jsonl'}:17 is not JSON"
    )
    assert first(PRETRAIN_CHECKPOINT_PATH="") == "PRETRAIN_CHECKPOINT_PATH is not set."
    step = tmp_path / "checkpoint" / "iter_0000005"
    step.mkdir(parents=True)
    assert (
        first(PRETRAIN_CHECKPOINT_PATH=str(step)) == f"PRETRAIN_CHECKPOINT_PATH={step} is one step of a run."
    )
    assert first(PRETRAIN_CHECKPOINT_PATH="absent") == "PRETRAIN_CHECKPOINT_PATH=absent does not exist."
    assert first(TOKENIZER="") == "TOKENIZER is not set."
    assert first(TOKENIZER="null") == "TOKENIZER=null reads no text."
    assert first(TOKENIZER="absent") == "TOKENIZER=absent cannot be used: absent does not exist."
    assert "has messages, but the tokenizer has no chat template" in first(TOKENIZER=str(files / "bare"))
    assert first(CHAT_TEMPLATE="absent").startswith("CHAT_TEMPLATE=absent cannot be used: ")
    assert first(OVER_LONG="split") == "OVER_LONG=split is not one of drop, truncate."
    assert first(EPOCHS="0") == "EPOCHS=0 trains nothing."
    assert first(SEQ_LEN="2").endswith("has no sample that can be learned")
    assert first(TP="3").startswith("tensor parallel 3 does not fit")
    (tmp_path / "empty.jsonl").touch()
    for path, problem in (
        ("absent.jsonl", "cannot be read"),
        (str(tmp_path / "empty.jsonl"), "holds no sample"),
    ):
        told = message(files, tmp_path / "output", VALID_DATASET_PATH=path)
        assert told.startswith(f"{path} {problem}") and "\n  try: VALID_DATASET_PATH=<file>.jsonl" in told
    assert not (tmp_path / "output").exists(), "a mistake leaves nothing behind"
    # Known only with the samples, which are kept.
    assert first(WARMUP_ITERS="50", TRAIN_ITERS="50") == "the warm-up takes 50 steps and the run 50."


def test_another_family_is_refused(files, tmp_path):
    run = saved_run(tmp_path / "run", make_plan(), None)
    text = message(files, tmp_path, "llama3", PRETRAIN_CHECKPOINT_PATH=str(run))
    assert text.startswith(f"PRETRAIN_CHECKPOINT_PATH={run} is a qwen2 model.")
    assert text.endswith("try: sh examples/linear_moe_qwen2/run_finetune_qwen.sh")


def test_a_run_goes_on_with_the_samples_that_it_has_not_seen(files, tmp_path):
    trained = plan(files, tmp_path, RUN_NAME="mine")
    saved_run(tmp_path / "mine", trained, files / "tokenizer")
    assert plan(files, tmp_path, RUN_NAME="mine", EPOCHS="9", TP="2", GPUS_PER_NODE="2").run_name == "mine"
    changes = [{"SEED": "5"}, {"GLOBAL_BATCH_SIZE": "8"}, {"PACK": "false"}, {"SEQ_LEN": "128"}]
    for change in [*changes, {"DATASET_PATH": str(files / "toy.jsonl")}]:
        assert message(files, tmp_path, RUN_NAME="mine", **change).startswith(
            f"run {tmp_path / 'mine'} would go on with other samples:\n"
        ), change
    path = tmp_path / "mine" / "config.json"  # of another tool, which says nothing of its arguments
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "arguments"}))
    assert plan(files, tmp_path, RUN_NAME="mine", SEED="5").settings.seed == 5
    path.write_text(json.dumps(config))
    (tmp_path / "mine" / "checkpoint" / "latest_checkpointed_iteration.txt").unlink()
    assert plan(files, tmp_path, RUN_NAME="mine", SEED="5").settings.seed == 5, "it has taken none to keep"


def test_a_run_goes_on_elsewhere_and_with_other_evaluations(files, tmp_path):
    """What is compared is the samples and their order: not where they lie, nor what else the command says."""
    trained = plan(files, tmp_path / "here", RUN_NAME="mine", PACK="false")
    saved_run(tmp_path / "there" / "mine", trained, files / "tokenizer")
    more = {"RUN_NAME": "mine", "PACK": "false", "VALID_DATASET_PATH": str(files / "toy.jsonl")}
    assert plan(files, tmp_path / "there", **more).run_dir == tmp_path / "there" / "mine"


def test_a_run_keeps_its_tokenizer_with_the_template_that_it_learned(files, tmp_path):
    from transformers import AutoTokenizer

    for source, template, kept in (("tokenizer", None, None), ("bare", PLAIN_TEMPLATE, PLAIN_TEMPLATE)):
        keep_tokenizer(tmp_path / source, files / source, template)
        keep_tokenizer(tmp_path / source, tmp_path / source / "tokenizer", template)  # once more, from itself
        found = AutoTokenizer.from_pretrained(tmp_path / source / "tokenizer")
        before = AutoTokenizer.from_pretrained(files / source)
        assert found.get_vocab() == before.get_vocab() and found.eos_token == before.eos_token
        assert found.chat_template == (kept or before.chat_template)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_script_has_every_variable(family: str):
    text = (EXAMPLES / SCRIPTS[family]).read_text()
    in_script = dict(re.findall(r'^: "\$\{(\w+):=(.*?)\}"', text, re.MULTILINE))
    assert in_script.keys() == (variables().keys() | variables(FinetuneSettings).keys()) - {"VOCAB_SIZE"}
    settings = read_environment(in_script, family)
    assert settings == read_environment(DEFAULTS, family), "spelt out for the reader"
    assert settings != RunSettings(base_model=family)
    assert float(in_script["EPOCHS"]) == FinetuneSettings().epochs
    assert text.endswith(f'\nexec sh "$start" --family {family} --finetune "$@"\n')
    tail = text.partition("# --- batch")[2].splitlines()[:-1]
    assert tail == (EXAMPLES / SCRIPTS["qwen2"]).read_text().partition("# --- batch")[2].splitlines()[:-1]


@pytest.mark.slow
def test_the_script_from_the_first_line_to_the_last(files, tmp_path):
    """Instructions for a tokenizer without a chat template, with a validation set; the older name of a script."""
    lines = [{"instruction": f"Name {i}.", "output": f"{i} {i}"} for i in range(12)]
    environment = {
        "PATH": os.environ["PATH"], "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "OUTPUT_BASEPATH": str(tmp_path), "RUN_NAME": "mine", "PRETRAIN_CHECKPOINT_PATH": "none", "PR": "fp32",
        "MODEL_SIZE": "tiny", "LA_MODULE": "gla", "LAYER_TYPE_LIST": "LN", "EXTRA_ARGS": "--num-layers 2",
        "DATASET_PATH": write_lines(tmp_path / "lines.jsonl", [*lines, EMPTY_ANSWER]), "SEQ_LEN": "128", "EPOCHS": "1",
        "VALID_DATASET_PATH": write_lines(tmp_path / "valid.jsonl", lines[:4]), "TOKENIZER": str(files / "bare"),
        "BATCH_SIZE": "1", "GLOBAL_BATCH_SIZE": "2", "LR": "1e-2", "PYTHONPATH": os.environ["PYTHONPATH"],
    }  # fmt: skip
    script = EXAMPLES / "linear_llama3" / "run_finetune_mcore_llama_withGA.sh"
    done = subprocess.run(["sh", str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 13 samples have an empty answer" in done.stdout
    assert re.search(r"validation loss at iteration \d+ \| lm loss value: .* \| lm loss PPL: ", done.stdout)
    run = tmp_path / "mine"
    assert (run / "tokenizer" / "chat_template.jinja").read_text() == PLAIN_TEMPLATE
    steps = metrics(run)
    assert len(steps) == int((run / "checkpoint" / "latest_checkpointed_iteration.txt").read_text()) > 1
    assert [r["iteration"] for r in records(run) if r not in steps] == [len(steps)], (
        "an epoch, which is the end"
    )
    assert json.loads((run / "config.json").read_text())["tokenizer"]["tokenizer_model"] == str(
        run / "tokenizer"
    )


def test_tokens_that_the_model_has_no_rows_for(files, tmp_path):
    """Added by the tokenizer's second file, of which the size of the vocabulary does not know."""
    folder = Path(shutil.copytree(files / "tokenizer", tmp_path / "tokenizer"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    added = {str(320 + i): {"content": f"<|{i}|>", "special": True} for i in range(100)}
    config["added_tokens_decoder"] = config.get("added_tokens_decoder", {}) | added
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    told = {}
    for token in (63, 64):
        path = write_lines(
            tmp_path / f"{token}.jsonl", [{"instruction": "Say it.", "output": f"<|{token}|>"}]
        )
        given = {"TOKENIZER": str(folder), "DATASET_PATH": path, "CHAT_TEMPLATE": "plain"}
        try:
            assert plan(files, tmp_path, **given).padded_vocab_size == 384
            told[token] = ""
        except ValueError as error:
            told[token] = str(error)
    what, why, instead = told[64].splitlines()
    assert told[63] == "" and what == f"{tmp_path / '64.jsonl'} has token 384, and the embedding 384 rows."
    assert why.startswith("  why: ") and instead == "  try: TOKENIZER=<the tokenizer of the model>"

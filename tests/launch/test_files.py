"""Checks against files: data, tokenizer, the run that would be resumed, the disk."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from linear_moe.launch.header import header
from linear_moe.launch.instructions import keep_tokenizer
from linear_moe.launch.megatron_args import held_out_documents, training_arguments
from linear_moe.launch.resume import architecture
from tests.data.token_files import write_tokenizer, write_tokens
from tests.launch.plans import make_plan, message


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """A tokenizer of 300 tokens and 2000 tokens written with it, as variables."""
    tokenizer = write_tokenizer(tmp_path / "tok")
    prefix = write_tokens(tmp_path / "mine", np.arange(2000) % 300, tokenizer)
    return {"DATASET_PATH": prefix, "TOKENIZER": tokenizer.path, "EVAL_ITERS": "0"}


def test_good_data(data: dict[str, str]):
    assert message(**data) == ""


def test_the_tokenizer_is_asked_for(data: dict[str, str]):
    assert message(DATASET_PATH=data["DATASET_PATH"]) == (
        f"TOKENIZER is not set, and DATASET_PATH={data['DATASET_PATH']} holds tokens of some tokenizer.\n"
        "  why: the vocabulary of the model and the end of a document come from the tokenizer.\n"
        f"  try: TOKENIZER={data['TOKENIZER']}"
    )


def test_no_document_is_left_for_evaluation(data: dict[str, str]):
    assert message(**data | {"EVAL_ITERS": "10"}) == (
        f"DATASET_PATH={data['DATASET_PATH']} has 1 document(s), too few to hold one out.\n"
        "  why: evaluation reads 1 % of the documents, rounded.\n"
        "  try: EVAL_ITERS=0 to train on all of them, or more than 50 documents"
    )
    flags = training_arguments(make_plan(**data))
    assert flags[flags.index("--split") + 1] == "100,0,0", "Megatron would count epochs of no token for ever"
    assert [held_out_documents(count) for count in (50, 51, 250)] == [0, 1, 2]


def test_a_tokenizer_trained_anew_under_the_same_name(data: dict[str, str], tmp_path: Path):
    write_tokenizer(tmp_path / "tok", 280)
    assert "which has changed since, TOKENIZER 280" in message(**data)
    assert message(**data).endswith(f"\n  try: preprocess the text again with {tmp_path}/tok")


def test_missing_prefix(data: dict[str, str], tmp_path: Path):
    data["DATASET_PATH"] = str(tmp_path / "your")
    assert message(**data) == (
        f"DATASET_PATH={tmp_path}/your: there is no {tmp_path}/your.bin.\n"
        "  why: DATASET_PATH is the path of a .bin/.idx pair without its suffix, often ending in _text_document.\n"
        f"  try: DATASET_PATH={tmp_path}/mine"
    )


def test_half_a_pair_a_folder_and_spaces(data: dict[str, str], tmp_path: Path):
    shutil.copytree(tmp_path, tmp_path / "my data", ignore=shutil.ignore_patterns("my data"))
    spaced = {**data, "DATASET_PATH": f"{tmp_path}/my data/mine"}
    assert message(**spaced) == ""
    flags = training_arguments(make_plan(**spaced))
    assert flags[flags.index("--data-path") + 1 :][:2] == [spaced["DATASET_PATH"], "--data-cache-path"]
    assert message(**{**data, "DATASET_PATH": f"{tmp_path}/"}).endswith(
        f"\n  try: DATASET_PATH={tmp_path}/mine"
    )
    (tmp_path / "mine.bin").unlink()
    assert f"there is no {tmp_path}/mine.bin." in message(**data)
    assert message(**data).endswith("\n  try: copy the other of the two files there, too")
    gone = message(**{**data, "DATASET_PATH": f"{tmp_path}/my data/gone"})
    assert f"DATASET_PATH={tmp_path}/my: there is no" in gone and "; a space separates two of them." in gone


def test_truncated_bin(data: dict[str, str], tmp_path: Path):
    with open(tmp_path / "mine.bin", "r+b") as stream:
        stream.truncate(1000)
    assert message(**data) == (
        f"DATASET_PATH={tmp_path}/mine cannot be read: {tmp_path}/mine.bin has 1000 bytes, but mine.idx describes 4000 "
        "(2000 tokens of uint16).\n"
        "  why: the copy or the preprocessing was cut short.\n"
        "  try: copy it again, or python tools/preprocess_data.py ... --overwrite"
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"not an index", "is not a Megatron index: it does not start with MMIDIDX"),
        (b"", "is not a Megatron index: it does not start with MMIDIDX"),
        (
            b"MMIDIDX\0\0" + bytes([9] + [0] * 24),
            "has version 9 and token type 0, unknown to Megatron-Core 0.19",
        ),
    ],
)
def test_broken_index(data: dict[str, str], tmp_path: Path, content: bytes, problem: str):
    (tmp_path / "mine.idx").write_bytes(content)
    assert f"mine.idx {problem}." in message(**data)


def test_too_little_data(data: dict[str, str]):
    text = message(**data, CP="1") + message(**{**data, "SEQ_LEN": "2048"})
    assert "has 2000 tokens, less than one sequence.\n  why: a sample is SEQ_LEN + 1 = 2049 tokens." in text


def test_data_of_another_tokenizer(data: dict[str, str], tmp_path: Path):
    other = write_tokenizer(tmp_path / "other", vocab_size=310)
    assert message(**{**data, "TOKENIZER": other.path}) == (
        f"DATASET_PATH={tmp_path}/mine was written with another tokenizer than TOKENIZER={tmp_path}/other.\n"
        f"  why: the data has vocabulary 300 of {tmp_path}/tok, TOKENIZER 310, and their tokens mean different text.\n"
        f"  try: TOKENIZER={tmp_path}/tok, or preprocess the text again with {tmp_path}/other"
    )


def test_a_copy_of_the_tokenizer_is_the_same_tokenizer(data: dict[str, str], tmp_path: Path):
    shutil.copytree(tmp_path / "tok", tmp_path / "copy")
    assert message(**{**data, "TOKENIZER": str(tmp_path / "copy" / "tokenizer.json")}) == ""


def test_tokens_beyond_the_vocabulary_without_a_manifest(data: dict[str, str], tmp_path: Path):
    (tmp_path / "mine.json").unlink()
    assert message(**data) == ""
    assert message(**{**data, "TOKENIZER": "null", "VOCAB_SIZE": "299"}) == (
        f"DATASET_PATH={tmp_path}/mine has token 299, but the vocabulary of TOKENIZER=null ends at 298.\n"
        "  why: data and model have to share one tokenizer.\n"
        "  try: TOKENIZER=<the tokenizer that wrote the data>, or VOCAB_SIZE=300"
    )


def test_every_part_of_a_blend_is_checked(data: dict[str, str], tmp_path: Path):
    blend = f"0.5 {tmp_path}/mine 0.5 {tmp_path}/gone"
    assert f"DATASET_PATH={tmp_path}/gone: there is no" in message(**{**data, "DATASET_PATH": blend})


@pytest.mark.parametrize("weights", [("0", "1"), ("-0.5", "1.5"), ("nan", "1"), ("1", "inf")])
def test_weights_of_a_blend_are_positive(data: dict[str, str], weights: tuple[str, str]):
    path = data["DATASET_PATH"]
    found = message(**{**data, "DATASET_PATH": f"{weights[0]} {path} {weights[1]} {path}"})
    assert "has a weight that is not a positive number" in found
    assert found.endswith(f"try: DATASET_PATH='1 {path} 1 {path}'")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda folder: shutil.rmtree(folder), "does not exist"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "has no tokenizer_config.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "is not a tokenizer"),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text("{}"),
            "names no end-of-document token",
        ),
    ],
)
def test_broken_tokenizer(data: dict[str, str], tmp_path: Path, spoil, problem: str):
    spoil(tmp_path / "tok")
    text = message(**data)
    assert text.startswith(f"TOKENIZER={tmp_path}/tok cannot be used: {tmp_path}/tok {problem}")


def finished_run(base: Path, name: str = "old", *, family: str = "qwen2", **variables: str) -> None:
    plan = make_plan(family=family, **variables, OUTPUT_BASEPATH=str(base), RUN_NAME=name)
    checkpoint = plan.run_dir / "checkpoint"
    (checkpoint / "iter_0000005").mkdir(parents=True)
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("5")
    arguments = ["--use-distributed-optimizer", *plan.extra_args]
    config = {"format": 1, "architecture": architecture(plan), "arguments": arguments}
    (plan.run_dir / "config.json").write_text(json.dumps(config))


def test_resume_with_the_same_model(tmp_path: Path):
    finished_run(tmp_path, LAYER_TYPE_LIST="LLLN")
    again = {"OUTPUT_BASEPATH": str(tmp_path), "RUN_NAME": "old", "LAYER_TYPE_LIST": "LLLN"}
    assert message(**again, TP="2", GPUS_PER_NODE="4", LR="1e-3", TRAIN_ITERS="20") == ""
    assert "resumed at step 5 of 10" in header(make_plan(**again))


def test_what_a_run_does_otherwise_is_told(data: dict[str, str], tmp_path: Path):
    finished_run(tmp_path)
    again = {"OUTPUT_BASEPATH": str(tmp_path), "RUN_NAME": "old", "TRAIN_ITERS": "20"}
    saved = training_arguments(make_plan(**again))
    config = json.loads((tmp_path / "old" / "config.json").read_text()) | {"arguments": saved}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert "changed since" not in header(make_plan(**again, TP="2", GPUS_PER_NODE="2"))
    assert (
        f"changed since this run was saved: --lr: 0.0001 -> 0.001; --data-path: not set -> {data['DATASET_PATH']}; "
        f"--mock-data: on -> not set. Another RUN_NAME begins anew."
    ) in header(make_plan(**again, **data, LR="1e-3"))


def test_resume_with_another_tokenizer(data: dict[str, str], tmp_path: Path):
    finished_run(tmp_path, **data)
    keep_tokenizer(tmp_path / "old", Path(data["TOKENIZER"]), None)
    again = {"OUTPUT_BASEPATH": str(tmp_path), "RUN_NAME": "old"}
    assert message(**again, **data) == ""
    other = write_tokenizer(tmp_path / "other", 310)
    mine = {"TOKENIZER": other.path, "DATASET_PATH": "mock"}
    assert make_plan(**again, **mine).padded_vocab_size == make_plan(**again, **data).padded_vocab_size
    assert message(**again, **mine) == (
        f"run {tmp_path}/old was trained with another tokenizer than TOKENIZER={other.path}.\n"
        f"  why: the tokens that it knows are those of {tmp_path}/old/tokenizer, and mean other text in this one.\n"
        f"  try: TOKENIZER={tmp_path}/old/tokenizer, or another RUN_NAME for a new run"
    )
    start = {
        "RUN_NAME": "new",
        "OUTPUT_BASEPATH": str(tmp_path),
        "PRETRAIN_CHECKPOINT_PATH": f"{tmp_path}/old",
    }
    assert message(**start, **mine) == ""
    assert "these weights know other tokens" in header(make_plan(**start, **mine))
    assert "these weights know other tokens" not in header(make_plan(**start, **data))


def test_resume_with_another_model(tmp_path: Path):
    finished_run(tmp_path, LAYER_TYPE_LIST="LLLN", EXTRA_ARGS="--gla-gate-rank 8")
    changed = {"LAYER_TYPE_LIST": "LLNN", "EXTRA_ARGS": "--moe-ffn-hidden-size 128 --expand-v 2"}
    assert message(OUTPUT_BASEPATH=str(tmp_path), RUN_NAME="old", **changed) == (
        f"run {tmp_path}/old has another architecture than this one:\n"
        "    moe_ffn_hidden_size: 64 -> 128\n"
        "    layer_kinds: gated_deltanet,gated_deltanet,gated_deltanet,softmax -> "
        "gated_deltanet,gated_deltanet,softmax,softmax\n"
        "    --gla-gate-rank: 8 -> None\n"
        "    --expand-v: None -> 2\n"
        "  why: a checkpoint fits the model that saved it; layout, batch, data and learning rate may change.\n"
        "  try: the variables of that run, or another RUN_NAME for a new one"
    )


def test_resume_with_other_memories(tmp_path: Path):
    """Top-k changes no shape: nothing else would tell."""
    finished_run(tmp_path, LA_MODULE="mom_gla", EXTRA_ARGS="--mom-shared-memory --mom-topk 1")
    again = {"OUTPUT_BASEPATH": str(tmp_path), "RUN_NAME": "old", "LA_MODULE": "mom_gla"}
    assert message(**again, EXTRA_ARGS="--mom-topk=1 --mom-shared-memory true") == ""
    assert "    --mom-topk: 1 -> 2\n" in message(**again, EXTRA_ARGS="--mom-topk 2 --mom-shared-memory")


def test_resume_with_another_family_of_the_same_sizes(tmp_path: Path):
    """The shapes are those of Llama 3, and what is computed with them is not."""
    sizes = "--num-query-groups 4 --ffn-hidden-size 256 --rotary-base 500000 --norm-epsilon 1e-5"
    finished_run(tmp_path, MODEL_SIZE="tiny-dense", EXTRA_ARGS=sizes)
    text = message(
        family="llama3", OUTPUT_BASEPATH=str(tmp_path), RUN_NAME="old", MODEL_SIZE="tiny", EXTRA_ARGS=sizes
    )
    assert text.startswith(
        f"run {tmp_path}/old has another architecture than this one:\n"
        "    family: qwen2 -> llama3\n"
        "    add_qkv_bias: True -> False\n"
    )


CHANGED_SWITCHES = {
    "qk_layernorm": (True, "True -> False"),
    "layernorm_zero_centered_gamma": (True, "True -> False"),
    "attention_output_gate": (True, "True -> False"),
    "rotary_percent": (0.25, "0.25 -> 1.0"),
    "moe_router_pre_softmax": (False, "False -> True"),
    "moe_layer_freq": ([0, 1, 1, 1], "0,1,1,1 -> 1,1,1,1"),
    "untie_embeddings_and_output_weights": (False, "False -> True"),
}


@pytest.mark.parametrize("name", CHANGED_SWITCHES)
def test_resume_with_another_switch(tmp_path: Path, name: str):
    """One that no shape tells; a config.json of a version that did not save it fits as before."""
    finished_run(tmp_path)
    again = {"OUTPUT_BASEPATH": str(tmp_path), "RUN_NAME": "old"}
    file = tmp_path / "old" / "config.json"
    config = json.loads(file.read_text())
    value, shown = CHANGED_SWITCHES[name]
    file.write_text(json.dumps(config | {"architecture": config["architecture"] | {name: value}}))
    assert f"\n    {name}: {shown}\n" in message(**again)
    others = {key: value for key, value in config["architecture"].items() if key != name}
    for earlier in (others, others | {name: None}):
        file.write_text(json.dumps(config | {"architecture": earlier}))
        assert message(**again) == ""


def test_extra_args_may_not_change_a_switch(tmp_path: Path):
    finished_run(tmp_path)
    again = {"OUTPUT_BASEPATH": str(tmp_path), "RUN_NAME": "old"}
    assert "qk_layernorm: False -> True" in message(**again, EXTRA_ARGS="--qk-layernorm")
    assert "rotary_percent: 1.0 -> 0.5" in message(**again, EXTRA_ARGS="--rotary-percent=0.5")


def test_resume_with_another_optimizer(tmp_path: Path):
    finished_run(tmp_path)
    assert message(OUTPUT_BASEPATH=str(tmp_path), RUN_NAME="old", DO="false") == (
        f"DO=false, but run {tmp_path}/old was saved with DO=true.\n"
        "  why: Megatron stores the state of the distributed optimizer in another form.\n"
        f"  try: DO=true, or RUN_NAME=<new> PRETRAIN_CHECKPOINT_PATH={tmp_path}/old to start from the weights alone"
    )


def test_resume_with_adam_after_sgd(tmp_path: Path):
    finished_run(tmp_path, EXTRA_ARGS="--optimizer=sgd")
    again = {"OUTPUT_BASEPATH": str(tmp_path), "RUN_NAME": "old"}
    assert message(**again, EXTRA_ARGS="--optimizer sgd") == ""
    assert message(**again).startswith(
        f"run {tmp_path}/old was trained with --optimizer sgd, and this is adam.\n"
    )


def test_resume_without_moments(tmp_path: Path):
    finished_run(tmp_path, EXTRA_ARGS="--no-save-optim")
    again = {"OUTPUT_BASEPATH": str(tmp_path), "RUN_NAME": "old"}
    assert message(**again).startswith(f"run {tmp_path}/old was saved with --no-save-optim.\n")
    assert message(**again, EXTRA_ARGS="--no-load-optim") == ""


def test_a_finished_run_is_not_saved_over_itself(tmp_path: Path):
    finished_run(tmp_path)
    again = {"OUTPUT_BASEPATH": str(tmp_path), "RUN_NAME": "old"}
    for iterations, saves in {"6": True, "5": False, "4": False}.items():
        plan = make_plan(**again, TRAIN_ITERS=iterations)
        assert ("--save" in training_arguments(plan)) is saves
        assert ("nothing is left to train" in header(plan)) is not saves


def test_a_checkpoint_that_was_cut_off(tmp_path: Path):
    """Megatron ends a run whose tracker is empty with exit code 0, and one without its folder with a traceback."""
    finished_run(tmp_path)
    folder = tmp_path / "old" / "checkpoint"
    tracker = folder / "latest_checkpointed_iteration.txt"
    for text in ("", "9", "half"):
        tracker.write_text(text)
        (folder / "iter_0000005" / ".metadata").touch()
        for variables in ({"RUN_NAME": "old"}, {"PRETRAIN_CHECKPOINT_PATH": str(tmp_path / "old")}):
            assert message(OUTPUT_BASEPATH=str(tmp_path), **variables) == (
                f"{tracker} says {text!r}, and there is no such checkpoint.\n"
                "  why: a save was cut off by a kill or a full disk, or files were removed or not copied.\n"
                f"  try: echo 5 > {tracker}"
            )
        (folder / "iter_0000005" / ".metadata").unlink()
        assert message(OUTPUT_BASEPATH=str(tmp_path), RUN_NAME="old").endswith(
            f"try: rm {tracker}, to begin at step 0"
        )


def test_weights_of_one_step(tmp_path: Path):
    finished_run(tmp_path)
    step = tmp_path / "old" / "checkpoint" / "iter_0000005"
    lines = message(PRETRAIN_CHECKPOINT_PATH=str(step), OUTPUT_BASEPATH=str(tmp_path)).splitlines()
    assert lines[0] == f"PRETRAIN_CHECKPOINT_PATH={step} is one step of a run."
    assert lines[2] == f"  try: PRETRAIN_CHECKPOINT_PATH={step.parent}, or a copy of it whose tracker says 5"


@pytest.mark.parametrize(
    ("name", "what", "instead"),
    [
        ("../x", "RUN_NAME=../x is a path.", "OUTPUT_BASEPATH=<base>/.. RUN_NAME=x"),
        (".", "RUN_NAME=. is a path.", "OUTPUT_BASEPATH=<base>/.. RUN_NAME=runs"),
        ("/x", "RUN_NAME=/x is a path.", "OUTPUT_BASEPATH=/ RUN_NAME=x"),
        ("x" * 256, f"RUN_NAME={'x' * 256} is 256 characters long.", f"RUN_NAME={'x' * 40}"),
        (
            "data_cache",
            "RUN_NAME=data_cache is taken: <base>/data_cache holds the index files of all runs.",
            None,
        ),
        ("old/mine", "RUN_NAME=old/mine is taken: <base>/old holds a run of its own.", None),
        ("ablation/mine", "", None),
    ],
)
def test_names_of_runs(tmp_path: Path, name: str, what: str, instead: str | None):
    base = tmp_path / "runs"
    finished_run(base)
    lines = message(OUTPUT_BASEPATH=str(base), RUN_NAME=name).splitlines() or [""]
    assert lines[0] == what.replace("<base>", str(base))
    if instead is not None:
        assert lines[2] == f"  try: {instead.replace('<base>/..', str(tmp_path))}"


def test_weights_of_another_model(tmp_path: Path):
    finished_run(tmp_path, MODEL_SIZE="tiny-dense")
    text = message(PRETRAIN_CHECKPOINT_PATH=str(tmp_path / "old"), OUTPUT_BASEPATH=str(tmp_path))
    assert text.startswith(
        f"PRETRAIN_CHECKPOINT_PATH={tmp_path}/old has another architecture than this one:\n"
    )
    assert "num_experts: None -> 8" in text
    assert text.endswith(
        "the variables of that run, or none of the model's: what is not set is the checkpoint's"
    )


def test_a_tokenizer_is_no_checkpoint(data: dict[str, str], tmp_path: Path):
    assert message(PRETRAIN_CHECKPOINT_PATH=data["TOKENIZER"]) == (
        f"PRETRAIN_CHECKPOINT_PATH={tmp_path}/tok holds no checkpoint.\n"
        "  why: it holds a tokenizer, which has its own variable now.\n"
        f"  try: TOKENIZER={tmp_path}/tok PRETRAIN_CHECKPOINT_PATH=none"
    )


def test_no_space_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**7))
    assert message(OUTPUT_BASEPATH=str(tmp_path)) == (
        f"{tmp_path} has 0.01 GB free; one checkpoint needs about 0.02 GB.\n"
        "  why: 0.001B parameters x 16 bytes (weights and optimizer), and 10 %.\n"
        "  try: OUTPUT_BASEPATH=<a larger disk>, or SAVE_INTERVAL=0 to save nothing"
    )


def test_output_that_is_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert message(OUTPUT_BASEPATH=str(tmp_path / "file")).startswith(f"cannot write to {tmp_path}/file.")

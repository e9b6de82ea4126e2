"""Checks against runs: the one that would be resumed, its name, the weights that another starts from."""

import json
import shlex
from pathlib import Path

import pytest

from linear_moe.launch.header import header
from linear_moe.launch.instructions import keep_tokenizer
from linear_moe.launch.megatron_args import training_arguments
from linear_moe.launch.resume import architecture, going_on, is_finished
from tests.data.token_files import write_tokenizer
from tests.launch.plans import make_plan, message


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
    assert message(**again, PRETRAIN_CHECKPOINT_PATH="/absent") == "", "it has weights of its own by now"


def test_what_is_to_be_typed_has_its_quotes(data: dict[str, str], tmp_path: Path):
    """Paths with spaces, pasted into a shell, are one word each."""
    base = tmp_path / "my runs"
    finished_run(base)
    index = json.loads((tmp_path / "mine.json").read_text()) | {"tokenizer": f"{tmp_path}/my tok"}
    (tmp_path / "mine.json").write_text(json.dumps(index))
    run, words = f"{base}/old", {"OUTPUT_BASEPATH": str(base), "RUN_NAME": "old"}
    for variables, assigned in (
        ({**words, "DO": "false"}, f"PRETRAIN_CHECKPOINT_PATH={run}"),
        (
            {"RUN_NAME": "my runs/old/../new one", "OUTPUT_BASEPATH": str(tmp_path)},
            f"OUTPUT_BASEPATH={run[:-4]}",
        ),
        (
            {"PRETRAIN_CHECKPOINT_PATH": f"{run}/checkpoint/iter_0000005"},
            f"PRETRAIN_CHECKPOINT_PATH={run}/checkpoint,",
        ),
        ({"DATASET_PATH": data["DATASET_PATH"]}, f"TOKENIZER={tmp_path}/my tok"),
    ):
        attempt = message(**variables).partition("\n  try: ")[2]
        assert assigned in shlex.split(attempt), attempt


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
    for spelt in ("--weight-decay=0", "--weight-decay 0"):
        assert "saved: --weight-decay: 0.1 -> 0. Another" in header(make_plan(**again, EXTRA_ARGS=spelt))


def test_tokens_to_train_on_count_those_of_earlier_steps(data: dict[str, str], tmp_path: Path):
    """Of steps of any size: twice the ranks, and so twice the batch, leave half the steps that are to come."""
    finished_run(tmp_path)
    again = {"OUTPUT_BASEPATH": str(tmp_path), "RUN_NAME": "old", "TRAIN_ITERS": "", "TRAIN_TOKENS": "10240"}
    metrics = tmp_path / "old" / "metrics.jsonl"
    steps = [{"iteration": step, "seconds": 1.0, "tokens": 1024} for step in range(1, 8)]
    evaluation = {"iteration": 2, "validation_loss": 1.0}
    metrics.write_text("".join(json.dumps(x) + "\n" for x in [*steps[:2], evaluation, *steps[2:]]) + '{"it')

    def planned(**variables: str):
        return going_on(make_plan(**{**again, **variables}))

    assert planned().settings.iterations == 10 and planned().tokens == 10240
    larger = planned(GPUS_PER_NODE="4")
    assert larger.global_batch_size == 16 and larger.settings.iterations == 5 + 3  # of 2048, for 5120
    assert "8 steps = 11.3k tokens" in header(larger) and "resumed at step 5 of 8" in header(larger)
    assert planned(SEQ_LEN="64").settings.iterations == 5 + 10
    assert is_finished(planned(TRAIN_TOKENS="5000")) and not is_finished(planned(TRAIN_TOKENS="6000"))
    by_steps = planned(GPUS_PER_NODE="4", TRAIN_ITERS="9", **data)
    assert by_steps.settings.iterations == 9 and by_steps.tokens == 5 * 1024 + 4 * 2048
    assert "9 steps = 13.3k tokens" in header(by_steps) and "= 6.66 epoch(s)" in header(by_steps)
    metrics.write_text(json.dumps(steps[4]) + "\n")  # not of all steps: it is not known how large those were
    assert planned(GPUS_PER_NODE="4").settings.iterations == 5


def test_an_embedding_of_another_size_is_of_a_tokenizer(data: dict[str, str], tmp_path: Path):
    finished_run(tmp_path, **data, EXTRA_VOCAB_SIZE="1000")
    start = {"PRETRAIN_CHECKPOINT_PATH": str(tmp_path / "old"), "OUTPUT_BASEPATH": str(tmp_path / "runs")}
    _, change, why, _ = message(**start, **data, EXTRA_VOCAB_SIZE="0").splitlines()
    assert change.strip() == "padded_vocab_size: 1408 -> 384" and "tokens of TOKENIZER" in why
    both = message(**start, **data, EXTRA_VOCAB_SIZE="0", LA_MODULE="gla")
    assert "why: a checkpoint fits the model that saved it" in both


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


def test_mixers_for_softmax_layers(tmp_path: Path):
    """What no run can go on with, an import can make of it; not so of other mixers, nor of a model that differs."""
    finished_run(tmp_path / "my runs", LAYER_TYPE_LIST="LN")
    run, base = f"{tmp_path}/my runs/old", {"OUTPUT_BASEPATH": f"{tmp_path}/my runs"}
    way = (
        f"; or, to replace its softmax layers and keep the rest, python tools/convert.py export --load '{run}' "
        f"--hf '{run}-hf', and then RUN_NAME=<new> PRETRAIN_CHECKPOINT_PATH='{run}-hf'"
    )
    assert message(RUN_NAME="old", LAYER_TYPE_LIST="LLLN", **base).endswith(
        f"another RUN_NAME for a new one{way}"
    )
    assert message(PRETRAIN_CHECKPOINT_PATH=run, LAYER_TYPE_LIST="L", **base).endswith(
        f"is the checkpoint's{way}"
    )
    for others in (
        {"LAYER_TYPE_LIST": "LN", "LA_MODULE": "gla"},
        {"LAYER_TYPE_LIST": "LLNN"},
        {"LAYER_TYPE_LIST": "L", "EXTRA_ARGS": "--moe-ffn-hidden-size 128"},
    ):
        assert message(RUN_NAME="old", **others, **base).endswith("another RUN_NAME for a new one")
    finished_run(tmp_path, "gates", family="qwen3_next", LAYER_TYPE_LIST="LN")
    gates = {"OUTPUT_BASEPATH": str(tmp_path), "RUN_NAME": "gates", "LAYER_TYPE_LIST": "LLLN"}
    assert message(family="qwen3_next", **gates).endswith("another RUN_NAME for a new one")


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
    "norm_epsilon": (1e-5, "1e-05 -> 1e-06"),
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
    base = tmp_path / "my runs"
    base.mkdir()
    finished_run(base)
    folder = base / "old" / "checkpoint"
    tracker = folder / "latest_checkpointed_iteration.txt"
    for text in ("", "9", "half"):
        tracker.write_text(text)
        (folder / "iter_0000005" / ".metadata").touch()
        for variables in ({"RUN_NAME": "old"}, {"PRETRAIN_CHECKPOINT_PATH": str(base / "old")}):
            assert message(OUTPUT_BASEPATH=str(base), **variables) == (
                f"{tracker} says {text!r}, and there is no such checkpoint.\n"
                "  why: a save was cut off by a kill or a full disk, or files were removed or not copied.\n"
                f"  try: echo 5 > '{tracker}'"
            )
        (folder / "iter_0000005" / ".metadata").unlink()
        assert message(OUTPUT_BASEPATH=str(base), RUN_NAME="old").endswith(
            f"try: rm '{tracker}', to begin at step 0"
        )


def test_copies_beside_the_steps_are_no_steps(tmp_path: Path):
    finished_run(tmp_path)
    folder = tmp_path / "old" / "checkpoint"
    for name in ("iter_0000005", "iter_0000007_copy", "iter_old"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / ".metadata").touch()
    (folder / "latest_checkpointed_iteration.txt").write_text("8")
    assert (
        message(OUTPUT_BASEPATH=str(tmp_path), RUN_NAME="old").splitlines()[2].startswith("  try: echo 5 > ")
    )


def test_a_config_that_gives_the_experts_of_all_layers_in_one_number(tmp_path: Path):
    """As earlier versions wrote it."""
    finished_run(tmp_path)
    path = tmp_path / "old" / "config.json"
    config = json.loads(path.read_text())
    assert set(config["architecture"]["moe_layer_freq"]) == {1}
    again = {"OUTPUT_BASEPATH": str(tmp_path), "RUN_NAME": "old"}
    for number, is_same in ((1, True), (2, False)):
        config["architecture"]["moe_layer_freq"] = number
        path.write_text(json.dumps(config))
        assert (message(**again) == "") is is_same


def test_nothing_has_changed_since_what_was_never_saved(tmp_path: Path):
    """A run that ended before its first checkpoint begins anew; one without its arguments cannot be compared."""
    finished_run(tmp_path)
    again = {"OUTPUT_BASEPATH": str(tmp_path), "RUN_NAME": "old", "TRAIN_ITERS": "20"}
    path, tracker = tmp_path / "old" / "config.json", "latest_checkpointed_iteration.txt"
    config = json.loads(path.read_text())
    config["arguments"] = training_arguments(make_plan(**again))
    path.write_text(json.dumps(config))
    assert "changed since" in header(make_plan(**again, LR="1e-3"))
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "arguments"}))
    assert "changed since" not in header(make_plan(**again, LR="1e-3"))
    assert message(**again, DO="false") == "", "loading will tell"
    path.write_text(json.dumps(config))
    (tmp_path / "old" / "checkpoint" / tracker).unlink()
    assert "changed since" not in header(make_plan(**again, LR="1e-3"))


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

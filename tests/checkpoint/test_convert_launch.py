"""Run scripts take a Hugging Face folder: its sizes, its conversion, and what happens is said in one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from linear_moe.launch import __main__ as launcher
from linear_moe.launch.header import notes
from linear_moe.launch.hugging_face import convert, import_command
from linear_moe.launch.megatron_args import training_arguments
from linear_moe.launch.preflight import preflight
from tests.checkpoint.hf_models import save_hf
from tests.training.tiny import metrics, train

SMALL = {"SEQ_LEN": "32", "TRAIN_ITERS": "2", "BATCH_SIZE": "1", "GLOBAL_BATCH_SIZE": "2", "PR": "fp32"}


def save(rank, world, folder, name):
    save_hf(folder, name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, _pool):
    base = tmp_path_factory.mktemp("hf")
    for name in ("qwen2_moe-renormalised", "llama"):
        _pool.run(1, save, str(base / name), name)
    return base


def plan_of(folder, tmp_path, family="qwen2", **variables):
    """As run_pretrain_*.sh would, with a mixer."""
    script = {"MODEL_SIZE": "", "LA_MODULE": "gla", "LAYER_TYPE_LIST": "LN", "EXTRA_VOCAB_SIZE": ""}
    given = {**script, **SMALL, "OUTPUT_BASEPATH": str(tmp_path / "out"), **variables}
    given["PRETRAIN_CHECKPOINT_PATH"] = str(folder)
    plan = launcher._plan_pretraining(given, family, 0)
    preflight(plan)
    return plan


def run_command(rank, world, words):
    from linear_moe.checkpoint.__main__ import main

    with patch.object(sys, "argv", words):
        return main()


def test_from_the_folder_to_a_step(folders, gloo, tmp_path):
    plan = plan_of(folders / "qwen2_moe-renormalised", tmp_path)
    assert (plan.size.hidden_size, plan.size.num_experts, plan.padded_vocab_size) == (64, 4, 256)
    assert not plan.family.softmax_before_topk  # renormalised probabilities
    assert not plan.run_dir.exists()
    said: list[str] = []
    with patch("subprocess.run") as run:
        run.return_value.returncode = 0
        assert convert(plan, said.append)
    words = run.call_args.args[0]
    assert words == import_command(plan, folders / "qwen2_moe-renormalised", plan.run_dir / "pretrained")
    assert len(said) == 1 and "is a Hugging Face folder: converting it once" in said[0]
    assert gloo(1, run_command, words[2:])[0] == 0
    assert convert(plan, said.append) and "converted before" in said[1]
    preflight(plan)  # the same architecture as what was converted
    finetuned = Path(shutil.copytree(folders / "qwen2_moe-renormalised", tmp_path / "finetuned"))
    weights = next(iter(finetuned.glob("*.safetensors")))
    weights.write_bytes(weights.read_bytes())  # of another time: of the same sizes, and other weights
    with pytest.raises(
        ValueError, match=r"/pretrained was made from .*renormalised, and PRETRAIN_CHECK"
    ) as told:
        plan_of(finetuned, tmp_path)
    assert f"or rm -r {plan.run_dir / 'pretrained'} to convert again" in str(told.value)
    arguments = training_arguments(plan)
    gloo(1, train, [*arguments, "--eval-iters", "0"])
    assert 4 < metrics(plan.run_dir)[0]["lm_loss"] < 7
    saved = json.loads((plan.run_dir / "pretrained" / "config.json").read_text())["architecture"]
    trained = json.loads((plan.run_dir / "config.json").read_text())["architecture"]
    assert saved == trained | {"model_size": saved["model_size"]}


def test_from_an_imported_run_to_a_step(folders, gloo, tmp_path):
    """A size without a name: what is not set is the run's; what is set and differs stays an error."""
    run = tmp_path / "imported"
    words = ["convert.py", "import", "--hf", str(folders / "qwen2_moe-renormalised"), "--save", str(run)]
    assert gloo(1, run_command, words)[0] == 0
    unset = {"MODEL_SIZE": "", "LA_MODULE": "", "LAYER_TYPE_LIST": ""}
    plan = plan_of(run, tmp_path, **unset)
    assert (plan.size.hidden_size, plan.size.num_experts, plan.padded_vocab_size) == (64, 4, 256)
    assert set(plan.kinds) == {"softmax"} and not plan.family.softmax_before_topk
    (note,) = [line for line in notes(plan) if line.startswith("those of PRETRAIN_CHECKPOINT_PATH: ")]
    assert {"LAYER_TYPE_LIST", "MODEL_SIZE"} <= set(note.rstrip(".").partition(": ")[2].split(", "))
    gloo(1, train, [*training_arguments(plan), "--eval-iters", "0"])
    assert 4 < metrics(plan.run_dir)[0]["lm_loss"] < 7
    assert plan_of(run, tmp_path, **unset).run_dir == plan.run_dir  # which can go on
    for given, found in (
        ({"LA_MODULE": "gla"}, "layer_kinds: softmax,softmax -> gla,gla"),
        ({"MODEL_SIZE": "tiny", "LAYER_TYPE_LIST": "N"}, "num_layers: 2 -> 4"),
        ({"MOE": "false"}, "num_experts: 4 -> None"),
        ({"EXTRA_ARGS": "--hidden-size 128"}, "hidden_size: 64 -> 128"),
    ):
        with pytest.raises(ValueError, match=f"another architecture than this one:(.|\n)*    {found}"):
            plan_of(run, tmp_path, RUN_NAME="other", **unset | given)
    for given, wrong, instead in (
        ({"MODEL_SIZE": "A0.3B"}, "MODEL_SIZE=A0.3B makes 12 layers", "MODEL_SIZE= (empty)"),
        (
            {"EXTRA_ARGS": "--num-layers 3"},
            "EXTRA_ARGS=--num-layers 3 makes 3 layers",
            "EXTRA_ARGS with --num-layers 2",
        ),
    ):
        with pytest.raises(ValueError) as refused:
            plan_of(run, tmp_path, RUN_NAME="other", **unset | given)
        what, _, instead_line = str(refused.value).splitlines()
        assert what == f"{wrong}, and PRETRAIN_CHECKPOINT_PATH={run} has 2."
        assert instead_line.startswith(f"  try: {instead}")
    with pytest.raises(
        ValueError, match=r"is a qwen2 model(.|\n)*sh examples/linear_moe_qwen2/run_pretrain_qwen"
    ):
        plan_of(run, tmp_path, "llama3", **unset)


def test_another_pattern_than_was_converted(folders, gloo, tmp_path):
    plan = plan_of(folders / "llama", tmp_path, "llama3", RUN_NAME="one", LAYER_TYPE_LIST="N")
    assert plan.kinds == ("softmax",) * 2 and plan.size.kv_channels == 24
    kept = plan_of(folders / "llama", tmp_path, "llama3", LA_MODULE="", LAYER_TYPE_LIST="")
    assert kept.kinds == plan.kinds
    some = plan_of(folders / "llama", tmp_path, "llama3", LA_MODULE="")
    assert some.kinds == ("gated_deltanet", "softmax")
    words = import_command(plan, folders / "llama", plan.run_dir / "pretrained")
    gloo(1, run_command, words[2:])
    with pytest.raises(ValueError, match="another architecture"):
        plan_of(folders / "llama", tmp_path, "llama3", RUN_NAME="one", LAYER_TYPE_LIST="L")


def test_what_is_said_of_a_folder_has_to_agree(folders, tmp_path):
    """Before anything is converted: sizes by name, experts, rows of the embedding, flags."""
    llama = folders / "llama"
    sizes = "--num-layers 2 --hidden-size 64 --ffn-hidden-size 96 --num-query-groups 2 --norm-epsilon 1e-6"
    sizes += " --kv-channels 24 --num-attention-heads 4"
    agreeing = {"MODEL_SIZE": "1B", "EXTRA_ARGS": sizes, "EXTRA_VOCAB_SIZE": "0"}
    for given, found in (
        ({"MODEL_SIZE": "8B", "LAYER_TYPE_LIST": "N"}, "num_layers: 2 -> 32"),
        ({"MOE": "true"}, "num_experts: None -> 8"),
        ({"EXTRA_ARGS": "--num-attention-heads 8"}, "num_attention_heads: 4 -> 8"),
        ({"EXTRA_ARGS": "--qk-layernorm"}, "qk_layernorm: False -> True"),
        ({"VOCAB_SIZE": "250", "EXTRA_VOCAB_SIZE": "300"}, "padded_vocab_size: 256 -> 640"),
        (agreeing, "rope_scaling_factor: 8.0 -> 32.0"),
    ):
        with pytest.raises(ValueError) as refused:
            plan_of(llama, tmp_path, "llama3", **given)
        what, *differences, _, instead = str(refused.value).splitlines()
        assert what == f"PRETRAIN_CHECKPOINT_PATH={llama} has another architecture than this one:"
        assert f"    {found}" in differences
        assert (
            instead
            == "  try: the variables of that run, or none of the model's: what is not set is the checkpoint's"
        )
    with pytest.raises(
        ValueError, match=r"MODEL_SIZE=8B makes 32 layers, and PRETRAIN_\w+=.*llama has 2\.\n"
    ):
        plan_of(llama, tmp_path, "llama3", MODEL_SIZE="8B", LA_MODULE="", LAYER_TYPE_LIST="")
    assert plan_of(llama, tmp_path, "llama3", MOE="false").size.num_layers == 2
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_is_that_of_the_folder(folders, tmp_path):
    """Where it has one; the rows stay those of its model."""
    assert plan_of(folders / "llama", tmp_path, "llama3").tokenizer is None
    folder = Path(shutil.copytree(folders / "llama", tmp_path / "llama"))
    vocab = {f"word{i}": i for i in range(200)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordLevel", "vocab": vocab}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "word199"}))
    plan = plan_of(folder, tmp_path, "llama3")
    assert plan.tokenizer is not None and plan.tokenizer.path == str(folder)
    assert (plan.vocab_size, plan.padded_vocab_size) == (200, 256)


def test_other_nodes_wait_for_the_first(folders, tmp_path):
    nodes = {"NNODES": "2", "MASTER_ADDR": "first", "NODE_RANK": "1"}
    plan = plan_of(folders / "llama", tmp_path, "llama3", **nodes)
    tracker = plan.run_dir / "pretrained" / "checkpoint" / "latest_checkpointed_iteration.txt"
    said, waited = [], []

    def sleep(seconds):
        assert seconds >= 1, "of a disk that many nodes ask"
        waited.append(seconds)
        if len(waited) == 3:
            tracker.parent.mkdir(parents=True)
            tracker.write_text("0")

    with patch("subprocess.run") as run, patch("time.sleep", sleep):
        assert convert(plan, said.append)
    assert not run.called and len(waited) == 3
    assert said == [
        f"PRETRAIN_CHECKPOINT_PATH={folders / 'llama'} is a Hugging Face folder: "
        f"waiting for the first node to make {plan.run_dir / 'pretrained'}"
    ]


def test_a_conversion_that_fails_ends_the_start(folders, tmp_path):
    plan = plan_of(folders / "llama", tmp_path, "llama3")
    with patch("linear_moe.launch.hugging_face.import_command", lambda *given: ["false"]):
        assert convert(plan, lambda line: None) is False
    assert not plan.run_dir.exists()


def test_a_conversion_that_fails_ends_the_start_of_other_nodes(folders, tmp_path):
    """Unless the first node tries again within a minute: the note is of an earlier start."""
    nodes = {"NNODES": "2", "MASTER_ADDR": "first"}
    first, second = (plan_of(folders / "llama", tmp_path, "llama3", **nodes, NODE_RANK=rank) for rank in "01")
    first.run_dir.mkdir(parents=True)
    said, waited = [], []
    with patch("linear_moe.launch.hugging_face.import_command", lambda *given: ["false"]):
        assert convert(first, lambda line: None) is False
    (note,) = second.run_dir.iterdir()

    def sleep(seconds):
        waited.append(seconds)
        if sum(waited) == 20:
            note.unlink()
        if sum(waited) == 40:
            note.touch()

    with patch("time.sleep", sleep):
        assert convert(second, said.append) is False
    assert 100 <= sum(waited) <= 110 and said[1].endswith(
        "could not make " + f"{second.run_dir / 'pretrained'}: its log says why"
    )


def test_mixers_of_yours_are_converted_by_their_module(folders, tmp_path, monkeypatch):
    (tmp_path / "my_mixers_to_convert.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    mine = {"MIXER_MODULES": "my_mixers_to_convert", "EXTRA_ARGS": "--gla-gate-rank 8"}
    plan = plan_of(folders / "llama", tmp_path, "llama3", **mine)
    command = import_command(plan, folders / "llama", plan.run_dir / "pretrained")
    assert command[-1].startswith("--extra-args=--gla-")
    assert command[-1].endswith(" --gla-gate-rank 8 --mixer-module my_mixers_to_convert")


def test_mistakes(folders, tmp_path):
    with pytest.raises(ValueError, match="is a llama3 model"):
        plan_of(folders / "llama", tmp_path)
    with pytest.raises(ValueError, match="tensor parallel 3"):
        plan_of(folders / "llama", tmp_path, "llama3", TP="3", GPUS_PER_NODE="3")
    broken = Path(shutil.copytree(folders / "llama", tmp_path / "broken"))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(ValueError, match="hidden_act = 'gelu'"):
        plan_of(broken, tmp_path, "llama3")
    assert not (tmp_path / "out").exists()


CONVERTERS = Path(__file__).parents[2] / "toolkits" / "model_checkpoints_convertor"
OLD_COMMANDS = {
    "qwen/hf2mcore_qwen2_convertor.sh A14B SRC DST 4 2 8 bf16 true false": "import --hf SRC --save DST",
    "qwen/hf2mcore_qwen2_convertor.sh 7B SRC DST 1 1 1 fp32 true true HF": "export --load SRC --hf DST --tokenizer HF",
    "deepseek/hf2mcore_deepseek_v2_moe_convertor.sh A2.4B SRC DST 1 1 4 false": "import --hf SRC --save DST",
    "deepseek/hf2mcore_deepseek_v2_moe_convertor.sh A2.4B SRC DST 1 1 4 bf16 true HF": (
        "export --load SRC --hf DST --tokenizer HF"
    ),
    "mistral/hf2mcore_convertor.sh 8x7B SRC ../../../ SRC DST 4 1 0 8 2 4 false 8": "import --hf SRC --save DST",
    "llama/hf2mcore_convertor.sh 8B HF ../../../ SRC DST 4 1 256 0 0 0 0 true": (
        "export --load SRC --hf DST --tokenizer HF"
    ),
}


@pytest.mark.parametrize("command", OLD_COMMANDS)
def test_old_converters(tmp_path, command):
    """Their positional arguments, as they were typed for the earlier system."""
    (tmp_path / "HF").mkdir()
    (tmp_path / "HF" / "tokenizer.json").touch()
    script, *words = command.split()
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": "echo"}
    done = subprocess.run(
        ["sh", str(CONVERTERS / script), *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"python tools/convert.py {OLD_COMMANDS[command]}"
    assert done.stdout.splitlines()[1].endswith(f"tools/convert.py {OLD_COMMANDS[command]}")


def test_old_converters_say_how_they_are_called():
    for script in CONVERTERS.glob("*/*.sh"):
        done = subprocess.run(["sh", str(script)], capture_output=True, text=True)
        what, why, instead = done.stderr.splitlines()
        assert done.returncode == 2 and what == f"linear_moe: {script.name} got 0 argument(s), too few."
        assert why.startswith("  why: ") and instead.startswith(f"  try: sh {script} MODEL_SIZE ")
        assert " SOURCE TARGET TP " in instead and "#" not in instead and "MG2HF" in instead

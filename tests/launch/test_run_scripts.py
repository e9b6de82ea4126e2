"""The run script of every family: the plans of all its sizes, and three steps of its smallest model on CPU."""

import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from linear_moe.launch.megatron_args import training_arguments
from linear_moe.model.families import FAMILIES
from tests.launch.plans import SCRIPTS, make_plan, message
from tests.training.tiny import losses, metrics, train

SIZES = [(family.name, size) for family in FAMILIES.values() for size in family.sizes]
NOTHING_SAVED = {"SAVE_INTERVAL": "0", "SEQ_LEN": "2048"}


def command(family: str, folder: Path, **variables: str) -> list[str]:
    """What the script would give `pretrain`, from its dry run in an otherwise empty environment."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.environ["PYTHONPATH"],
        "LINEAR_MOE_DRY_RUN": "1",
        "OUTPUT_BASEPATH": str(folder),
        **{"MODEL_SIZE": "tiny", "SEQ_LEN": "64", "BATCH_SIZE": "1", "GLOBAL_BATCH_SIZE": "2", "PR": "fp32"},
        **{"LR": "1e-2", "WARMUP_ITERS": "0", "EVAL_ITERS": "0", "RUN_NAME": "run"},
        **variables,
    }
    done = subprocess.run(["sh", str(SCRIPTS[family])], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.replace("\\\n", ""))
    return words[words.index("linear_moe.training.pretrain") + 1 :]


@pytest.mark.parametrize("pattern", ["", "N", "{}N"])
@pytest.mark.parametrize(("family", "size"), SIZES)
def test_every_size_can_be_planned(family: str, size: str, pattern: str):
    layers = FAMILIES[family].sizes[size].num_layers
    mixed = pattern.format("L" * (layers - 1))
    variables = {"MODEL_SIZE": size, "LAYER_TYPE_LIST": mixed, **NOTHING_SAVED}
    assert message(8, family=family, **variables) == ""
    arguments = training_arguments(make_plan(8, family=family, **variables))
    kinds = arguments[arguments.index("--layer-kinds") + 1].split(",")
    assert len(kinds) == layers and kinds.count("softmax") == {"": 0, "N": layers}.get(pattern, 1)


@pytest.mark.parametrize(
    ("family", "variables", "total"),
    [
        (
            "llama3",
            {"MODEL_SIZE": "8B", "MOE": "true"},
            47.5e9,
        ),  # 8 experts as wide as the feed-forward blocks
        ("llama3", {"MODEL_SIZE": "8B", "MOE": "false"}, 8.0e9),
        ("mixtral", {"MODEL_SIZE": "8x7B", "MOE": "true"}, 46.7e9),
        ("mixtral", {"MODEL_SIZE": "7B"}, 46.7e9),  # the earlier system's name for it
        ("mixtral", {"MODEL_SIZE": "8x7B", "MOE": "false"}, 7.24e9),  # Mistral 7B
        ("deepseek_v2", {"MODEL_SIZE": "A2.4B", "MOE": "false"}, 2.6e9),
    ],
)
def test_experts_when_asked(family: str, variables: dict[str, str], total: float):
    from linear_moe.model.families import estimate_parameters

    plan = make_plan(8, family=family, LAYER_TYPE_LIST="N", **variables)
    found, _ = estimate_parameters(plan.size, plan.kinds, plan.padded_vocab_size)
    assert found == pytest.approx(total, rel=0.02)
    assert message(8, family=family, LAYER_TYPE_LIST="N", **variables, **NOTHING_SAVED) == ""
    assert (plan.size.is_moe, "-moe-" in plan.run_name, "-dense-" in plan.run_name) == {
        "llama3true": (True, True, False),
        "llama3false": (False, False, False),
        "mixtraltrue": (True, False, False),
        "mixtral": (True, False, False),
        "mixtralfalse": (False, False, True),
        "deepseek_v2false": (False, False, True),
    }[family + variables.get("MOE", "")]


def test_tensor_parallel_divides_what_is_compressed():
    sizes = {"MODEL_SIZE": "A2.4B", "GPUS_PER_NODE": "8", "EXTRA_ARGS": "--kv-lora-rank 100", **NOTHING_SAVED}
    assert message(8, family="deepseek_v2", TP="8", **sizes) == (
        "tensor parallel 8 does not fit deepseek_v2 A2.4B.\n"
        "  why: TP has to divide 16 heads and the feed-forward width 1408, 10944, 2816, "
        "and the compressed widths 164.\n"
        "  try: TP=4 (legal: 1, 2, 4)"
    )


@pytest.mark.parametrize(
    ("family", "variables"),
    [
        ("qwen2", {"LAYER_TYPE_LIST": "LLLN"}),
        ("deepseek_v2", {"LAYER_TYPE_LIST": "LN"}),
        ("mixtral", {"LAYER_TYPE_LIST": "NLLL", "LA_MODULE": "gla"}),
        ("llama3", {"LAYER_TYPE_LIST": "LN", "LA_MODULE": "mamba2"}),
        ("llama3", {"LAYER_TYPE_LIST": "LN", "MOE": "true"}),
        ("mamba2", {"EXTRA_ARGS": "--num-experts 4 --moe-ffn-hidden-size 64", "LAYER_TYPE_LIST": "LLLN"}),
    ],
)
def test_each_script_trains(gloo, tmp_path: Path, family: str, variables: dict[str, str]):
    gloo(1, train, command(family, tmp_path, TRAIN_ITERS="3", SAVE_INTERVAL="0", **variables))
    steps = metrics(tmp_path / "run")
    assert [step["iteration"] for step in steps] == [1, 2, 3]
    assert all(6.5 < step["lm_loss"] < 7.5 and 0 < step["grad_norm"] < 100 for step in steps), steps
    assert steps[2]["lm_loss"] != steps[0]["lm_loss"]
    # The cosine from LR, at step 1, to MIN_LR behind the last step.
    cosine = [1e-5 + (1e-2 - 1e-5) * (1 + math.cos(math.pi * done / 3)) / 2 for done in range(3)]
    assert [step["learning_rate"] for step in steps] == pytest.approx(cosine)


def test_latent_attention_resumes(gloo, tmp_path: Path):
    """Step 3 after a checkpoint of step 2 is step 3; another architecture is refused before anything starts."""
    steps = {"LAYER_TYPE_LIST": "NLLN", "EXTRA_ARGS": "--lr-decay-iters 3"}
    for folder, runs in (("whole", ["3"]), ("cut", ["2", "3"])):
        for iterations in runs:
            gloo(1, train, command("deepseek_v2", tmp_path / folder, TRAIN_ITERS=iterations, **steps))
    assert losses(tmp_path / "cut" / "run") == losses(tmp_path / "whole" / "run")
    rates = [[s["learning_rate"] for s in metrics(tmp_path / name / "run")] for name in ("cut", "whole")]
    assert rates[0] == rates[1]
    other = {"MODEL_SIZE": "tiny", "RUN_NAME": "run", "OUTPUT_BASEPATH": str(tmp_path / "cut")}
    other |= {"LAYER_TYPE_LIST": "NLLN", "EXTRA_ARGS": "--kv-lora-rank 64 --moe-router-group-topk 3"}
    said = message(family="deepseek_v2", **other)
    assert "kv_lora_rank: 32 -> 64" in said and "moe_router_group_topk: 2 -> 3" in said

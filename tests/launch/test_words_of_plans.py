"""What a plan is called, how much it is, what the header says of it; refusals that name a file or a flag."""

import json
from pathlib import Path

import pytest

from linear_moe.launch.header import header, notes
from linear_moe.launch.megatron_args import DEFAULT_PORT, torchrun_command, training_arguments
from linear_moe.launch.plan import _split_blend
from tests.launch.plans import make_plan, message


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        (1, "512"),
        (1, "999"),
        (2, "1.0k"),
        (1000, "512.0k"),
        (10**6, "512.0M"),
        (10**9, "512.0B"),
        (10**12, "512.0T"),
    ],
)
def test_tokens_of_a_run(steps: int, text: str):
    each = {"999": 999, "1.0k": 500}.get(text, 512)
    plan = make_plan(TRAIN_ITERS=str(steps), SEQ_LEN=str(each), GLOBAL_BATCH_SIZE="1")
    assert plan.tokens_text() == text


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({}, "qwen2-tiny-gla-LLLN"),
        ({"LAYER_TYPE_LIST": "N"}, "qwen2-tiny-softmax-N"),
        ({"LAYER_TYPE_LIST": "N21N", "LA_MODULE": "gla,kda"}, "qwen2-tiny-kda+gla-NL2N"),
        ({"MOE": "false"}, "qwen2-tiny-dense-gla-LLLN"),
        ({"MOE": "true"}, "qwen2-tiny-gla-LLLN"),
        ({"MODEL_SIZE": "tiny-dense", "MOE": "true"}, "qwen2-tiny-dense-moe-gla-LLLN"),
        ({"RUN_NAME": "mine"}, "mine"),
    ],
)
def test_names_that_runs_get(variables: dict[str, str], name: str):
    """The mixers in the order in which they first come; softmax is named where it is alone."""
    given = {"LA_MODULE": "gla", "LAYER_TYPE_LIST": "LLLN"} | variables
    assert make_plan(**given).run_name == name


def test_a_batch_for_interleaved_stages_is_a_multiple_of_them():
    """At least 8 sequences, in whole micro batches of all ranks, and with VPP in groups of PP of these."""
    plain = {"PP": "2", "BATCH_SIZE": "3"}
    assert make_plan(2, **plain).global_batch_size == 9
    assert make_plan(2, **plain, VPP="2").global_batch_size == 12
    assert (
        make_plan(8, **plain).global_batch_size == 12
        and make_plan(4, **plain, VPP="2").global_batch_size == 12
    )


def test_tensor_parallel_sizes_that_fit():
    """TP divides the groups of keys and values, or is a multiple of them; experts are cut by ETP, if that is set."""
    devices = {"GPUS_PER_NODE": "4", "BATCH_SIZE": "1"}
    for groups, legal in (("2", True), ("4", True), ("1", True)):
        told = message(4, TP="4", EXTRA_ARGS=f"--num-query-groups {groups}", **devices)
        assert (told == "") is legal, told
    odd = {"EXTRA_ARGS": "--moe-ffn-hidden-size 66", **devices}
    assert message(4, TP="4", **odd).startswith("tensor parallel 4 does not fit qwen2 tiny.")
    assert message(4, TP="4", ETP="1", **odd) == message(4, TP="2", **odd) == ""


def test_experts_with_a_capacity_and_warm_ups_that_end():
    assert message(TOKEN_DROPPING="true") == ""
    assert message(TOKEN_DROPPING="true", TRAIN_CAPACITY_FACTOR="0").startswith(
        "TRAIN_CAPACITY_FACTOR=0 drops"
    )
    assert message(TRAIN_ITERS="1", WARMUP_ITERS="1").startswith("the warm-up takes 1 steps and the run 1.")
    assert message(TRAIN_ITERS="1", WARMUP_ITERS="0") == ""
    assert message(LR="1e-4", MIN_LR="1e-4") == "", "a rate that stays"


def test_words_of_the_command():
    """What is recorded with a run, the backend of its device, and where its processes meet."""

    def after(flag: str, cuda: int = 0, **variables: str) -> str:
        words = training_arguments(make_plan(cuda, **variables))
        return words[words.index(flag) + 1]

    assert after("--la-module", LA_MODULE="gla", LAYER_TYPE_LIST="LLLN") == "gla"
    assert after("--distributed-backend") == "gloo" and after("--distributed-backend", 1) == "nccl"
    alone, port = (" ".join(torchrun_command(make_plan(**v))) for v in ({}, {"MASTER_PORT": "1234"}))
    assert "--rdzv-endpoint=127.0.0.1:0" in alone and "--master-port" not in alone
    assert "--master-addr=127.0.0.1 --master-port=1234 " in port and "rdzv" not in port


def test_the_layout_in_the_header():
    shown = header(make_plan(8, TP="2", PP="2", VPP="2", EP="2", ETP="1"))
    assert "8 GPU(s) = TP 2 + SP x PP 2 (VPP 2) x CP 1 x DP 2, experts EP 2 x ETP 1, stages " in shown
    bare = header(make_plan(2, CP="2", MOE="false"))
    assert "2 GPU(s) = TP 1 x PP 1 x CP 2 x DP 1\n" in bare


def test_notes_on_layouts_and_devices():
    def told(cuda: int = 0, **variables: str) -> str:
        return "\n".join(notes(make_plan(cuda, **variables)))

    nodes = {"NNODES": "2", "MASTER_ADDR": "host"}
    assert f"2 nodes meet at host:{DEFAULT_PORT}: " in told(1, **nodes)
    assert "2 nodes meet at host:1234: " in told(1, **nodes, MASTER_PORT="1234")
    assert "nodes meet" not in told(1)
    assert "SP=true does nothing with TP=1." in told(2, SP="true")
    assert "SP=true does nothing" not in told(2, SP="true", TP="2")
    assert "SP is on: Megatron trains experts under TP" in told(2, TP="2")
    large = {"MODEL_SIZE": "0.5B", "PR": "bf16"}
    assert "0.5B on a CPU takes minutes per step; MODEL_SIZE=demo" in told(**large)
    assert "PR=bf16 is slow without a GPU" in told(**large)
    assert "a CPU" not in told(1, **large) and "slow" not in told(1, **large)
    assert "ETP is 1 on CPU with EP > 1" in told(NPROC_PER_NODE="4", TP="2", EP="2")
    assert "ETP is 1" not in told(4, TP="2", EP="2") + told(NPROC_PER_NODE="4", TP="2", EP="2", ETP="1")


LONG = [f"part_{i}_text_document" for i in range(99)]


@pytest.mark.parametrize(
    ("text", "weights", "prefixes"),
    [
        ("a", [], ["a"]),
        ("0.5 a 0.5 b", [0.5, 0.5], ["a", "b"]),
        ("1 a b", [], ["1", "a", "b"]),
        ("a b", [], ["a", "b"]),
        ("", [], []),
        ("1 a 2", [], ["1", "a", "2"]),
        # Longer than the name of a file may be.
        (" ".join(f"2 part_{i}_text_document" for i in range(99)), [2.0] * 99, LONG),
        (" ".join(LONG), [], LONG),
    ],
)
def test_blends(text: str, weights: list[float], prefixes: list[str]):
    """Weights before prefixes; what is no such list is read as prefixes, of which the checks find the first."""
    assert _split_blend(text) == (weights, prefixes)


def test_a_prefix_with_spaces_is_one(tmp_path: Path):
    (tmp_path / "1 a.idx").touch()
    assert _split_blend(f"{tmp_path}/1 a") == ([], [f"{tmp_path}/1 a"])


def test_a_damaged_manifest(data: dict[str, str]):
    path = Path(data["DATASET_PATH"] + ".json")
    path.write_text("{")
    assert message(**data).startswith(f"{path} is not a manifest of tools/preprocess_data.py")
    assert message(**data).endswith(f"\n  try: rm {path}, or preprocess again")
    without = {name: value for name, value in data.items() if name != "TOKENIZER"}
    assert message(**without).endswith("\n  try: TOKENIZER=<folder with tokenizer.json>, or TOKENIZER=null")
    path.write_text(json.dumps({"hello": 1}))
    assert "is not a manifest" in message(**data)


@pytest.mark.parametrize("number", ["x", "0", "1.5", "-3"])
def test_sizes_that_are_no_numbers(number: str):
    assert message(EXTRA_ARGS=f"--hidden-size {number}") == (
        f"--hidden-size {number} of EXTRA_ARGS is not a positive number.\n"
        "  why: it is a size of the model.\n"
        "  try: --hidden-size 8"
    )


def test_sizes_that_mean_nothing():
    assert message(family="deepseek_v2", EXTRA_ARGS="--num-query-groups 2") == (
        "EXTRA_ARGS holds --num-query-groups, which changes nothing here.\n"
        "  why: with latent attention all heads share one compressed key and value.\n"
        "  try: leave it out"
    )

"""Variables to settings: defaults, types, and numbers derived from them; the script and the table say the same."""

import re
from pathlib import Path

import pytest

from linear_moe.launch import __main__ as launcher
from linear_moe.launch.cluster import RETIRED, first_node, retired_variables, with_cluster
from linear_moe.launch.environment import (
    _OF_OTHERS,
    _OURS,
    RunSettings,
    default_mixer,
    given_values,
    misspelt_variables,
    read_environment,
    texts_of,
    variables,
)
from linear_moe.launch.errors import PreflightError
from linear_moe.launch.instructions import FinetuneSettings
from linear_moe.launch.preflight import kernel_backends
from linear_moe.model.families import FAMILIES
from tests.launch.plans import SCRIPTS


def settings(**values: str) -> RunSettings:
    return read_environment(values, "qwen2")


def test_every_variable_has_a_description():
    for name, (_, doc) in variables().items():
        assert doc.endswith("."), name
        assert "\n" not in doc, name


def test_values_have_their_types():
    s = settings(
        TP="2", LR="1e-3", SP="True", PR="BF16", TRAIN_TOKENS="15e9", LAYER_TYPE_LIST=" LLLN ", SEED="0"
    )
    assert (s.tp, s.lr, s.sp, s.pr, s.train_tokens, s.layer_type_list, s.seed) == (
        2, 1e-3, True, "bf16", 15_000_000_000, "LLLN", 0,
    )  # fmt: skip


def test_large_whole_numbers_are_exact():
    assert settings(TRAIN_TOKENS="9007199254740993").train_tokens == 9007199254740993  # 2**53 + 1


@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_variable_is_not_set(text: str):
    assert settings(TP=text, LAYER_TYPE_LIST=text) == settings()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("TP", "0"),
        ("TP", "-1"),
        ("TP", "nan"),
        ("TP", "\u00b2"),  # a digit, and no number
        ("TP", "1e999"),
        ("LR", "-1"),
        ("LR", "inf"),
        ("SP", "2"),
        ("PR", "x"),
    ],
)
def test_bad_values_are_errors(name: str, text: str):
    with pytest.raises(PreflightError, match=f"^{name}={re.escape(text)} is not "):
        settings(**{name: text})


@pytest.mark.parametrize(
    ("given", "iterations", "warmup"),
    [
        (
            {},
            915528,
            1,
        ),  # 15e9 tokens of 8 x 2048 a step, rounded up; 10000 warm-up tokens are still one step
        ({"TRAIN_TOKENS": "32768", "WARMUP_TOKENS": "16384"}, 2, 1),
        ({"TRAIN_TOKENS": "32769", "WARMUP_TOKENS": "16385"}, 3, 2),
        ({"TRAIN_TOKENS": "1e9", "TRAIN_ITERS": "7", "WARMUP_ITERS": "3"}, 7, 3),
        ({"TRAIN_ITERS": "1"}, 1, 0),  # a run of one step has no room for a warm-up
        ({"TRAIN_ITERS": "10", "WARMUP_TOKENS": "0"}, 10, 0),
    ],
)
def test_steps_from_tokens(given: dict[str, str], iterations: int, warmup: int):
    s = settings(**given)
    assert (s.iterations, s.warmup_iterations) == (iterations, warmup)


@pytest.mark.parametrize("family", SCRIPTS)
def test_every_script_has_every_variable_with_the_same_default(family: str):
    text = SCRIPTS[family].read_text()
    in_script = dict(re.findall(r'^: "\$\{(\w+):=(.*?)\}"', text, re.MULTILINE))
    assert set(in_script) == set(variables())
    mixer = default_mixer(family)
    assert read_environment(in_script, family) == RunSettings(
        base_model=family, la_module=mixer, pretrain_checkpoint_path="none"
    )
    # Spelt out for the reader; empty, so that a checkpoint may decide.
    assert re.search(rf" {FAMILIES[family].default_size} \((.*, )?if empty\)", text)
    assert f"(empty: {mixer})" in text and mixer == (FAMILIES[family].mixer or "gated_deltanet")
    assert in_script["MODEL_SIZE"] == in_script["LA_MODULE"] == ""
    assert text.endswith(f'\nexec sh "$start" --family {family} "$@"\n')


def test_scripts_differ_in_their_model_section_only():
    tails = [path.read_text().partition("# --- data ---")[2].splitlines()[:-1] for path in SCRIPTS.values()]
    assert all(tail == tails[0] for tail in tails)


def test_retired_variables_say_what_replaces_them():
    (line,) = retired_variables({"MB": "true", "FU": ""})
    assert line.startswith("MB does nothing: MegaBlocks is gone: USE_GEMM=true is the fast path")


def test_misspelt_variables_are_told():
    mine = {
        "TRAIN_ITER": "5",
        "tp": "2",
        "MASTER_ADDRESS": "x",
        "HOME": "/",
        "RANK": "0",
        "SP": "true",
        "PACKS": "",
    }
    found = misspelt_variables(mine, {*variables()})
    assert [line.split()[0] for line in found] == ["TRAIN_ITER", "tp", "MASTER_ADDRESS"]
    assert [line.split()[-3] for line in found] == ["TRAIN_ITERS", "TP", "MASTER_ADDR"]


def test_names_that_others_have(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Each is told, and stands for a variable that there is; none is one itself."""
    known = {*variables(), *variables(FinetuneSettings)}
    given = {
        "MICRO_BATCH_SIZE": "1",
        "TRAIN_STEPS": "9",
        "learning_rate": "1",
        "dtype": "fp32",
        "NAME": "host",
        "MBS": "",
    }
    assert misspelt_variables(given, known) == [
        f"{name} is no variable of a run, and does nothing: {ours} is one."
        for name, ours in (
            ("MICRO_BATCH_SIZE", "BATCH_SIZE"),
            ("TRAIN_STEPS", "TRAIN_ITERS"),
            ("learning_rate", "LR"),
            ("dtype", "PR"),
        )
    ]
    assert set(_OURS.values()) <= known and not set(_OURS) & (known | {*RETIRED})
    given = {
        "OUTPUT_BASEPATH": str(tmp_path),
        "MODEL_SIZE": "tiny",
        "LINEAR_MOE_DRY_RUN": "1",
        "LAYER_TYPE": "N",
    }
    assert launcher.main(["--family", "qwen2"], given) == 0, "a note, and no more"
    assert (
        "LAYER_TYPE is no variable of a run, and does nothing: LAYER_TYPE_LIST is one."
        in capsys.readouterr().err
    )


def test_names_that_clusters_set_share_a_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    """And none is told once its own variable has been chosen; scripts give that its default."""
    known = {*variables(), *variables(FinetuneSettings)}
    cluster = {"CHECKPOINT_PATH": "/ckpt", "DTYPE": "float32", "NUM_NODES": "4", "DATA_PATH": "/data"}
    defaults = {"PR": "BF16", "NNODES": "1", "DATASET_PATH": "mock", "PRETRAIN_CHECKPOINT_PATH": "none"}
    line = (
        "no variable of a run, whatever else reads it: CHECKPOINT_PATH (PRETRAIN_CHECKPOINT_PATH is), "
        "DTYPE (PR is), NUM_NODES (NNODES is), DATA_PATH (DATASET_PATH is)."
    )
    assert misspelt_variables(cluster, known) == misspelt_variables(cluster | defaults, known) == [line]
    chosen = {"PR": "fp32", "NNODES": "4", "DATASET_PATH": "x", "PRETRAIN_CHECKPOINT_PATH": "y"}
    assert misspelt_variables(cluster | chosen, known) == []
    assert "(PR is)" in misspelt_variables(cluster | chosen | {"PR": ""}, known)[0]
    mistake = misspelt_variables({"SEQ_LENGTH": "8", "SEQ_LEN": "4096"}, known)
    assert len(mistake) == 1, "nobody but a trainer has that name: of two, one is not meant"
    assert {*_OURS} >= _OF_OTHERS and {_OURS[name] for name in _OF_OTHERS} <= {*variables()}
    slurm = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "4", "SLURM_NODEID": "0"}
    slurm |= {"SLURM_STEP_NODELIST": "gpu[1-4]", "NUM_NODES": "4", "LINEAR_MOE_DRY_RUN": "1"}
    slurm |= {"MODEL_SIZE": "tiny", "OUTPUT_BASEPATH": str(tmp_path), "GPUS_PER_NODE": "1"}
    assert launcher.main(["--family", "qwen2"], slurm) == 0
    assert "NUM_NODES" not in capsys.readouterr().err, "srun has told NNODES"


def test_variables_of_finetuning_are_told(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Whoever pretrains for EPOCHS=3 would get the 15 billion tokens of TRAIN_TOKENS."""
    given = {"EPOCHS": "3", "OVER_LONG": " ", "SEED": "1", "OUTPUT_BASEPATH": str(tmp_path)}
    assert (
        launcher.main(["--family", "qwen2"], given | {"LINEAR_MOE_DRY_RUN": "1", "MODEL_SIZE": "tiny"}) == 0
    )
    told = capsys.readouterr().err
    assert told.startswith(
        "linear_moe: EPOCHS does nothing here: only finetuning reads it.\nlinear_moe  qwen2 "
    )


def test_the_home_of_a_path_in_quotes(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = read_environment({"OUTPUT_BASEPATH": "~/runs", "DATASET_PATH": "a~/b"}, "qwen2")
    assert (found.output_basepath, found.dataset_path) == ("/home/me/runs", "a~/b")
    lists = {
        "DATASET_PATH": "0.3 ~/a 0.7\t~/b",
        "VALID_DATASET_PATH": "a.jsonl ~/b.jsonl",
        "EXTRA_ARGS": "--x ~/y",
    }
    texts = texts_of(lists)
    assert [*texts.values()] == [
        "0.3 /home/me/a 0.7\t/home/me/b",
        "a.jsonl /home/me/b.jsonl",
        "--x /home/me/y",
    ]
    assert read_environment(lists, "qwen2").dataset_path == texts["DATASET_PATH"]
    assert given_values(lists, FinetuneSettings) == {"valid_dataset_path": "a.jsonl /home/me/b.jsonl"}


def test_srun_tells_the_nodes():
    found = with_cluster(
        {
            "SLURM_PROCID": "3",
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_NODES": "4",
            "SLURM_STEP_NUM_TASKS": "4",
            "SLURM_NODEID": "3",
            "SLURM_STEP_NODELIST": "gpu[07-10]",
            "SLURM_JOB_ID": "123456",
        }
    )
    s = read_environment(found, "qwen2")
    assert (s.nnodes, s.node_rank, s.master_addr, s.master_port) == (4, 3, "gpu07", 20_000 + 123456 % 20_000)


@pytest.mark.parametrize(
    "step", [{}, {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}]
)
def test_one_node_of_slurm(step: dict[str, str]):
    """In a batch script without srun, all tasks of the job are this one node's to start."""
    job = {"SLURM_PROCID": "0", "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "20001"}
    found = with_cluster(job | step)
    assert found == job | step | ({"NNODES": "1", "NODE_RANK": "0", "MASTER_PORT": "20001"} if step else {})


def test_variables_win_over_slurm():
    environment = {"SLURM_PROCID": "0", "SLURM_JOB_NUM_NODES": "4", "NNODES": "1"}
    assert with_cluster(environment) == environment


def test_the_container_service_of_the_earlier_scripts():
    found = with_cluster(
        {"ENV": "dlc", "WORLD_SIZE": "2", "RANK": "1", "KUBERNETES_CONTAINER_RESOURCE_GPU": "8"}
    )
    assert (found["NNODES"], found["NODE_RANK"], found["GPUS_PER_NODE"]) == ("2", "1", "8")
    assert "NNODES" not in with_cluster({"WORLD_SIZE": "2", "RANK": "1"})
    for one in ({"WORLD_SIZE": "1"}, {"WORLD_SIZE": "2", "NNODES": "2"}, {"WORLD_SIZE": "2", "NNODES": "1"}):
        assert with_cluster(one | {"RANK": "0", "MASTER_ADDR": "host"}) == one | {
            "RANK": "0",
            "MASTER_ADDR": "host",
        }


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu1", "gpu1"), ("gpu[003-006,010],login1", "gpu003"), ("a[1,3]-b[2-4],c", "a1-b2"), ("x1,x2", "x1")],
)
def test_first_node(nodes: str, first: str):
    assert first_node(nodes) == first


def test_backends_of_kernels_are_known_before_the_start(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Nothing is written where LINEAR_MOE_KERNELS names none; the names are those of the kernels."""
    from linear_moe.kernels.dispatch import NAMES

    assert kernel_backends() == NAMES
    given = {"OUTPUT_BASEPATH": str(tmp_path), "MODEL_SIZE": "tiny", "LINEAR_MOE_DRY_RUN": "true"}
    for name in ("", *NAMES):
        assert launcher.main(["--family", "qwen2"], given | {"LINEAR_MOE_KERNELS": name}) == 0
    capsys.readouterr()
    for more in ([], ["--finetune"]):
        assert launcher.main(["--family", "qwen2", *more], given | {"LINEAR_MOE_KERNELS": "cuda"}) == 2
        assert capsys.readouterr().err == (
            "linear_moe: LINEAR_MOE_KERNELS=cuda names no backend.\n"
            "  why: the backends are chunked, reference, triton.\n"
            "  try: LINEAR_MOE_KERNELS= (empty), or LINEAR_MOE_KERNELS=chunked\n"
        )
    assert list(tmp_path.iterdir()) == []

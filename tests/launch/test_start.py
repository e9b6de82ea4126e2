"""The launcher as a process: exit codes, what appears on disk, how fast a mistake is reported."""

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from linear_moe.launch import __main__ as launcher
from linear_moe.launch import check_network as network
from linear_moe.launch.errors import PreflightError
from linear_moe.launch.lock import hold_run
from tests.launch.plans import make_plan

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples" / "linear_moe_qwen2" / "run_pretrain_qwen.sh"
EVERY_SCRIPT = sorted((REPOSITORY / "examples").glob("*/run_*.sh"))
SHELLS = [shell for shell in ("sh", "dash", "bash") if shutil.which(shell)]


def run_script(folder: Path, shell: str = "sh", **variables: str) -> subprocess.CompletedProcess:
    """The script in an empty environment, as on a fresh machine."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
        **variables,
    }
    return subprocess.run(
        [shell, str(SCRIPT)], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    "script",
    [
        *(str(path.relative_to(REPOSITORY)) for path in EVERY_SCRIPT),
        "examples/start.sh",
        "scripts/setup.sh",
        "scripts/demo.sh",
        "scripts/python.sh",
    ],
)
def test_scripts_parse(script: str, shell: str):
    subprocess.run([shell, "-n", str(REPOSITORY / script)], check=True)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("script", ["setup", "demo"])
def test_help_of_a_script_starts_nothing(tmp_path: Path, script: str, shell: str):
    """Nor does a word that it does not know; in a copy, where there is nothing that it could start."""
    shutil.copytree(REPOSITORY / "scripts", tmp_path / "scripts")
    ask = [shell, f"scripts/{script}.sh"]
    for flag in ("-h", "--help"):
        done = subprocess.run([*ask, flag], cwd=tmp_path, capture_output=True, text=True, timeout=20)
        assert done.returncode == 0 and done.stderr == "" and len(done.stdout.splitlines()) == 3, done
        assert done.stdout.startswith(f"sh scripts/{script}.sh\n    "), done.stdout
    done = subprocess.run([*ask, "--hlep"], cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"linear_moe: scripts/{script}.sh takes no --hlep.\n  why: ")
    assert [path.name for path in tmp_path.iterdir()] == ["scripts"]


@pytest.mark.parametrize("script", EVERY_SCRIPT, ids=lambda path: path.name)
def test_words_behind_a_script_reach_the_launcher(tmp_path: Path, script: Path):
    """They were left out without a word: ``--help`` and ``TP=2`` started a run of the defaults."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nfor word; do echo "<$word>"; done\n')
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(python)}
    argv = ["sh", str(script), "--help", "a b"]
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("<--help>\n<a b>\n")


def test_words_that_say_nothing_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture):
    given = {"OUTPUT_BASEPATH": str(tmp_path), "MODEL_SIZE": "tiny", "LINEAR_MOE_DRY_RUN": "1"}
    for words, instead in (
        (["TP=2", "PP=2"], "TP=2 PP=2 sh <this script>"),
        (["--gla-gate-rank", "32"], "EXTRA_ARGS='--gla-gate-rank 32' sh <this script>"),
        (["--log-format=a b"], "EXTRA_ARGS=''\"'\"'--log-format=a b'\"'\"'' sh <this script>"),
    ):
        assert launcher.main(["--family", "qwen2", *words], given) == 2
        found = capsys.readouterr()
        assert found.err == (
            f"linear_moe: {words[0]} stands behind the command, where it says nothing.\n"
            f"  why: a run is described by variables, which stand before it.\n  try: {instead}\n"
        )
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit, match="0"):
        launcher.main(["--family", "qwen2", "--help"], given)
    assert "LAYER_TYPE_LIST" in capsys.readouterr().out


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("script", EVERY_SCRIPT, ids=lambda path: path.name)
def test_every_variable_of_a_script_reaches_the_launcher(tmp_path: Path, script: Path, shell: str):
    """Set in the script, set from outside, or added by its user; called from elsewhere, by a name with spaces."""
    copy = tmp_path / "my repository" / "examples" / script.parent.name
    shutil.copytree(script.parent, copy)
    shutil.copy(REPOSITORY / "examples" / "start.sh", copy.parent)
    shutil.copytree(REPOSITORY / "scripts", tmp_path / "my repository" / "scripts")
    text = (copy / script.name).read_text()
    (copy / script.name).write_text(text.replace("\nset -a", "\nset -a\nMINE=mine\n#", 1))
    launcher = tmp_path / "python"
    launcher.write_text('#!/bin/sh\necho "$@"\nenv\n')
    launcher.chmod(0o755)
    done = subprocess.run(
        [shell, str(copy / script.name)],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHON": str(launcher), "TP": "2", "LR": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    started, *lines = done.stdout.splitlines()
    assert started.startswith("-m linear_moe.launch --family ")
    assert started.endswith(" --finetune") == ("finetune" in script.name)
    found = dict(line.split("=", 1) for line in lines)
    in_script = dict(re.findall(r'^: "\$\{(\w+):=(.*?)\}"', text, re.MULTILINE)) | {"TP": "2"}
    if in_script.keys() != {"TP"}:  # an older name of another script
        assert found["MINE"] == "mine"
    assert {name: found[name] for name in in_script} == in_script
    assert found["PYTHONPATH"] == str(tmp_path / "my repository")


@pytest.mark.parametrize("shell", SHELLS)
def test_dry_run_prints_the_command_and_touches_nothing(tmp_path: Path, shell: str):
    done = run_script(tmp_path, shell, LINEAR_MOE_DRY_RUN="1", MODEL_SIZE="tiny", LAYER_TYPE_LIST="LN")
    assert done.returncode == 0, done.stderr
    assert "-m linear_moe.training.pretrain" in done.stdout
    assert "--layer-kinds gated_deltanet,softmax,gated_deltanet,softmax" in done.stdout
    assert done.stdout.splitlines()[0].split()[1:3] == ["-m", "torch.distributed.run"], "the command alone"
    assert (
        done.stderr.startswith("linear_moe  qwen2 tiny   LN x 2: ")
        and "\nnote        mock data" in done.stderr
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shell", SHELLS)
def test_a_copy_of_a_script_asks_for_the_repository(tmp_path: Path, shell: str):
    """As sbatch makes one, in a folder of its own."""
    copy = shutil.copy(SCRIPT, tmp_path)
    environment = {"PATH": os.environ["PATH"], "PYTHON": "/nowhere/python"}
    done = subprocess.run([shell, copy], env=environment, capture_output=True, text=True)
    assert done.returncode and done.stdout == ""
    assert "LINEAR_MOE_START: is not set, and this is a copy (sbatch makes one)" in done.stderr
    environment["LINEAR_MOE_START"] = str(REPOSITORY / "examples" / "start.sh")
    done = subprocess.run([shell, copy], env=environment, capture_output=True, text=True)
    assert done.stderr.startswith("linear_moe: there is no /nowhere/python.")


def test_a_mistake_is_code_2_one_message_and_nothing_else(tmp_path: Path):
    done = run_script(tmp_path, MODEL_SIZE="tiny", TP="3")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "linear_moe: tensor parallel 3 does not fit qwen2 tiny.\n"
        "  why: TP has to divide 4 heads and the feed-forward width 64, and to fit 4 key/value groups.\n"
        "  try: TP=4 (legal: 1, 2, 4)\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_no_environment_yet(tmp_path: Path):
    done = run_script(tmp_path, PYTHON="/nowhere/python")
    assert done.returncode == 2
    assert done.stderr.startswith("linear_moe: there is no /nowhere/python.\n  why: ")


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("echo 'it is Python 2.7, and 3.12 or newer is needed' >&2; exit 1", "it is Python 2.7, and 3.12 or newer"),
        (f'exec {sys.executable} -I -S "$@"', "it lacks numpy, torch, megatron."),
    ],
)  # fmt: skip
def test_an_interpreter_that_cannot_run_this(tmp_path: Path, shell: str, body: str, why: str):
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\n{body}\n")
    interpreter.chmod(0o755)
    done = run_script(tmp_path, shell, PYTHON=str(interpreter))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"linear_moe: {interpreter} cannot run this.\n  why: {why}"), done.stderr
    assert done.stderr.count("\n") == 3


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"TP": "3", "DATASET_PATH": "/x", "TOKENIZER": "/y", "LINEAR_MOE_KERNELS": "triton"}, 2),
        ({"MODEL_SIZE": "tiny", "LINEAR_MOE_DRY_RUN": "1"}, 0),
    ],
    ids=["a mistake", "none"],
)
def test_a_run_is_checked_without_torch(given: dict[str, str], code: int):
    program = (
        "import sys; from linear_moe.launch.__main__ import main; "
        f"code = main(['--family', 'qwen2'], {given}); "
        "heavy = {'torch', 'megatron', 'transformers', 'tokenizers'} & set(sys.modules); "
        "sys.exit(code if not heavy else str(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, done.stderr


def test_help_lists_every_variable(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        launcher.main(["--help"], {})
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "\n  LAYER_TYPE_LIST           One symbol per layer:" in text
    assert "always fp32. One of fp32, bf16, fp16 [bf16]" in text
    assert "LR=1e-5" in text, "where finetuning differs"


def test_one_launcher_at_a_time_trains_a_run(tmp_path: Path, capsys: pytest.CaptureFixture):
    variables = {"OUTPUT_BASEPATH": str(tmp_path), "RUN_NAME": "mine", "MODEL_SIZE": "tiny", "SEQ_LEN": "64"}
    variables |= {"CUDA_VISIBLE_DEVICES": "", "TRAIN_ITERS": "2"}
    (tmp_path / "mine").mkdir()
    told: list[str] = []
    with hold_run(make_plan(**variables), told.append):
        assert launcher.main(["--family", "qwen2"], variables) == 2
    what, why, instead = capsys.readouterr().err.splitlines()
    assert what == f"linear_moe: run {tmp_path}/mine is being trained right now."
    assert f"{tmp_path}/mine/.node0.lock" in why and instead == (
        "  try: another RUN_NAME, or wait until that one has ended"
    )
    assert [path.name for path in (tmp_path / "mine").rglob("*")] == [".node0.lock"]
    hold_run(make_plan(**variables), told.append).close()
    assert told == []


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_locks(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / "mine").mkdir()
    told: list[str] = []
    hold_run(make_plan(OUTPUT_BASEPATH=str(tmp_path), RUN_NAME="mine"), told.append).close()
    assert told == [
        f"{tmp_path}/mine is on a file system without locks (No locks available): nothing keeps a second launcher "
        f"from this run, and both would write the same checkpoints and metrics."
    ]


def test_the_place_where_nodes_meet(tmp_path: Path, capsys: pytest.CaptureFixture):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        variables = {
            "OUTPUT_BASEPATH": str(tmp_path),
            "MODEL_SIZE": "tiny",
            "SEQ_LEN": "64",
            "TRAIN_ITERS": "2",
        }
        for more, what in (
            ({"MASTER_PORT": str(port)}, f"MASTER_PORT={port} is taken on this node."),
            (
                {"NNODES": "2", "MASTER_ADDR": "no-host.invalid"},
                "MASTER_ADDR=no-host.invalid is no host that",
            ),
        ):
            assert launcher.main(["--family", "qwen2"], variables | more) == 2
            told = capsys.readouterr().err
            assert told.startswith(f"linear_moe: {what}") and told.count("\n") == 3
    assert list(tmp_path.iterdir()) == []


def test_the_port_that_is_taken_for_several_nodes(monkeypatch: pytest.MonkeyPatch):
    """One node alone takes any free one."""
    nodes = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1"}
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setattr(network, "DEFAULT_PORT", taken.getsockname()[1])
        network.check_network(make_plan(8))
        network.check_network(make_plan(8, NODE_RANK="1", **nodes))  # it is the first that listens
        with pytest.raises(PreflightError, match=r"is taken on this node(.|\n)*, the same on every node$"):
            network.check_network(make_plan(8, **nodes))


@pytest.mark.parametrize("word", ["1", "true", "YES"])
def test_words_for_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture, word: str):
    variables = {"OUTPUT_BASEPATH": str(tmp_path), "MODEL_SIZE": "tiny", "SEQ_LEN": "64", "TRAIN_ITERS": "2"}
    assert launcher.main(["--family", "qwen2"], variables | {"LINEAR_MOE_DRY_RUN": word}) == 0
    assert "linear_moe.training.pretrain" in capsys.readouterr().out
    assert launcher.main(["--family", "qwen2"], variables | {"LINEAR_MOE_DRY_RUN": "please"}) == 2
    assert "LINEAR_MOE_DRY_RUN=please is not true or false." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "log").touch()
    variables = {"OUTPUT_BASEPATH": str(tmp_path), "RUN_NAME": "mine", "MODEL_SIZE": "tiny", "SEQ_LEN": "64"}
    assert launcher.main(["--family", "qwen2"], variables | {"TRAIN_ITERS": "2"}) == 2
    assert (
        f"linear_moe: {tmp_path}/mine/log cannot be written: File exists.\n  why: " in capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["OUTPUT_BASEPATH", "DATASET_PATH", "TOKENIZER", "PRETRAIN_CHECKPOINT_PATH"])
def test_a_path_that_cannot_be_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture, name: str):
    """As in a folder that nobody else may enter, which holds nothing back from tests that root runs."""
    path = str(tmp_path / ("x" * 300))
    variables = {"OUTPUT_BASEPATH": str(tmp_path), "MODEL_SIZE": "tiny", "TOKENIZER": "null", name: path}
    assert launcher.main(["--family", "qwen2"], variables) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"linear_moe: {path}") and " cannot be used: File name too long.\n  why: " in told
    assert list(tmp_path.iterdir()) == []


def test_mixers_of_a_person_that_do_not_import(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """They are imported early where they replace softmax layers of a Hugging Face folder, and told of all the same."""
    (tmp_path / "my_broken_mixers.py").write_text("import my_absent_package")
    monkeypatch.syspath_prepend(tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"rms_norm_eps": 1e-6, "vocab_size": 250, "max_position_embeddings": 128}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "qwen2"} | sizes))
    variables = {"PRETRAIN_CHECKPOINT_PATH": str(tmp_path / "model"), "MIXER_MODULES": "my_broken_mixers"}
    variables |= {"OUTPUT_BASEPATH": str(tmp_path), "LA_MODULE": "gla", "LAYER_TYPE_LIST": "LN"}
    assert launcher.main(["--family", "qwen2"], variables) == 2
    assert capsys.readouterr().err.startswith(
        "linear_moe: mixer module 'my_broken_mixers' cannot be imported"
    )


def test_a_defect_is_no_mistake(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launcher, "check_kernels", lambda environment: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        launcher.main(["--family", "qwen2"], {})

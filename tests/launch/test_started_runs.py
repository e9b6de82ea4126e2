"""A run from its variables to torchrun, which is not started: what it is given, what is said, what is left behind."""

import re
import signal
from pathlib import Path
from typing import Any

import pytest

from linear_moe.launch import __main__ as launcher
from linear_moe.launch.megatron_args import torchrun_command
from tests.launch.plans import make_plan

SMALL = {"RUN_NAME": "mine", "MODEL_SIZE": "tiny", "SEQ_LEN": "64", "TRAIN_ITERS": "2"}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], Path, dict[str, str], Any]]:
    """Calls of ``run_logged``: the command, the log, the environment, and which lines are shown."""
    calls = []

    def run_logged(
        command: list[str], log: Path, environment: dict[str, str], show: Any, received: list[signal.Signals]
    ) -> int:
        calls.append((command, log, environment, show))
        return 0

    monkeypatch.setattr(launcher, "run_logged", run_logged)
    return calls


def test_what_is_started(tmp_path: Path, started: list, capsys: pytest.CaptureFixture):
    given = SMALL | {"OUTPUT_BASEPATH": str(tmp_path), "GPUS_PER_NODE": "1", "TRAIN_ITER": "3", "MB": "true"}
    mine = given | {"OMP_NUM_THREADS": "7", "HF_HUB_OFFLINE": "0", "ANYTHING": "else"}
    assert launcher.main(["--family", "qwen2"], mine) == 0
    ((command, log, environment, show),) = started
    assert command == torchrun_command(make_plan(**given))
    assert environment.items() >= mine.items(), "what a person sets wins"
    assert environment["PYTHONUNBUFFERED"] == "1"
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in environment, "one queue of kernels is for TP and CP"
    assert log.parent == tmp_path / "mine" / "log" and "\nparameters  about " in log.read_text()
    assert "--train-iters 2" in log.read_text(), "how it was started"
    assert show(b"step 1/2  loss 1\n") and not show(b"building GPT model ...\n")
    out, err = capsys.readouterr()
    assert re.search(r"\nparameters  about 1\.\d\dM, \d{3}\.\d\dk active per token;", out)
    assert f"\nlog         {log} (VERBOSE=true shows" in out
    assert [line.split(" ")[1] for line in err.splitlines()] == ["MB", "TRAIN_ITER"], "both do nothing"
    assert launcher.main(["--family", "qwen2"], given | {"VERBOSE": "true"}) == 0
    _, log, environment, show = started[1]
    assert show(b"building GPT model ...\n") and f"log         {log}\n" in capsys.readouterr().out
    assert environment["HF_HUB_OFFLINE"] == "1" and int(environment["OMP_NUM_THREADS"]) >= 1


@pytest.mark.parametrize("name", ["TP", "CP"])
def test_one_queue_of_kernels(tmp_path: Path, started: list, name: str):
    given = SMALL | {"OUTPUT_BASEPATH": str(tmp_path), "GPUS_PER_NODE": "2", name: "2"}
    assert launcher.main(["--family", "qwen2"], given) == 0
    assert started[0][2]["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


def test_each_node_has_its_log(tmp_path: Path, started: list, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launcher, "check_network", lambda plan: None)
    nodes = {"NNODES": "2", "MASTER_ADDR": "here", "NODE_RANK": "1", "OUTPUT_BASEPATH": str(tmp_path)}
    assert launcher.main(["--family", "qwen2"], SMALL | nodes) == 0
    assert started[0][1].name.endswith("-node1.log")


def test_the_code_of_a_run_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launcher, "run_logged", lambda *arguments: 5)
    assert launcher.main(["--family", "qwen2"], SMALL | {"OUTPUT_BASEPATH": str(tmp_path)}) == 5


def test_nothing_is_trained_from_what_was_not_converted(
    tmp_path: Path, started: list, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launcher, "convert", lambda plan, announce: False)
    assert launcher.main(["--family", "qwen2"], SMALL | {"OUTPUT_BASEPATH": str(tmp_path)}) == 2
    assert not started and not (tmp_path / "mine" / "log").exists()


def test_a_run_keeps_the_tokenizer_of_its_data(tmp_path: Path, started: list, data: dict[str, str]):
    given = SMALL | data | {"OUTPUT_BASEPATH": str(tmp_path / "runs")}
    assert launcher.main(["--family", "qwen2"], given) == 0
    kept = tmp_path / "runs" / "mine" / "tokenizer" / "tokenizer.json"
    assert kept.read_bytes() == (Path(data["TOKENIZER"]) / "tokenizer.json").read_bytes()

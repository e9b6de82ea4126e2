"""eval/lm_eval_linear_moe.sh up to its last line, with a stand-in for lm_eval that says how it was called."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.eval.tiny_folder import write_tokenizer
from tests.inference.models import argv
from tests.training.tiny import train

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "eval" / "lm_eval_linear_moe.sh"
STAND_IN = "import json, os, sys\nprint(json.dumps([sys.argv[1:], dict(os.environ)]))\n"


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder, as far as the script looks."""
    found = tmp_path / "model"
    found.mkdir()
    (found / "config.json").write_text('{"model_type": "qwen2"}')
    return found


@pytest.fixture
def call(tmp_path):
    """``call(path, **variables)``: exit code, what lm_eval was told and its environment, and the messages."""
    package = tmp_path / "packages" / "lm_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)

    def called(path: Path | str, **variables: str):
        environment = {"PYTHON": sys.executable, "PYTHONPATH": str(package.parent), **variables}
        command = ["sh", str(SCRIPT), *([str(path)] if path else [])]
        done = subprocess.run(
            command, env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        told, seen = json.loads(done.stdout) if done.stdout.startswith("[[") else (done.stdout, {})
        return done.returncode, told, seen, done.stderr

    return called


def options(told: list[str]) -> dict[str, str]:
    return dict(zip(told[::2], told[1::2], strict=True))


def test_a_path_is_enough(call, folder):
    code, told, seen, messages = call(folder)
    assert code == 0 and messages == ""
    asked = options(told)
    assert asked["--model"] == "hf" and json.loads(asked["--model_args"]) == {
        "pretrained": str(folder),
        "trust_remote_code": True,
        "dtype": "float32",
        "max_length": 2048,
    }
    assert asked["--batch_size"] == "16" and asked["--output_path"] == "lm_eval_result"
    for task in ("piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "mmlu", "wikitext"):
        assert task in asked["--tasks"].split(",")
    assert set(asked) == {"--model", "--model_args", "--tasks", "--batch_size", "--output_path"}
    assert str(ROOT) in seen["PYTHONPATH"].split(":"), "the package's kernels would not be used"


def test_every_variable_arrives(call, folder):
    variables = {"TASKS": "recall", "NUM_FEWSHOT": "2", "LIMIT": "10", "DEVICE": "cpu", "BATCH_SIZE": "4"}
    variables |= {"TASK_PATH": "my tasks", "DATA_PATH": "/data", "DTYPE": "bfloat16", "MAX_LENGTH": "512"}
    extra = "--log_samples --seed 3"
    code, told, seen, _ = call(
        "", CHECKPOINT_PATH=str(folder), EXTRA_ARGS=extra, OUTPUT_PATH="out", **variables
    )
    assert code == 0 and told[-3:] == ["--log_samples", "--seed", "3"]
    asked = options(told[:-3])
    assert asked["--tasks"] == "fda,swde,squad_completion,nq_open,triviaqa,drop"
    model = json.loads(asked["--model_args"])
    assert model["dtype"] == "bfloat16" and model["max_length"] == 512
    named = ("--num_fewshot", "--limit", "--device", "--batch_size", "--include_path", "--output_path")
    assert [asked[name] for name in named] == ["2", "10", "cpu", "4", "my tasks", "out"]
    assert seen["HF_HUB_CACHE"] == "/data/hub" and seen["HF_DATASETS_CACHE"] == "/data/datasets"
    assert seen["HF_HUB_OFFLINE"] == seen["HF_DATASETS_OFFLINE"] == "1"


def test_variables_that_described_the_model_change_nothing_and_say_so(call, folder):
    code, told, _, messages = call(folder, LA_MODULE="gla", MODEL_SIZE="A1B", LINEAR_MOE_DRY_RUN="true")
    assert code == 0
    assert "-m lm_eval --model hf" in told and "gla" not in told
    assert f'"pretrained": "{folder}"' in " ".join(shlex.split(told)), "a command to type"
    assert messages.count("changes nothing") == 2 and "LA_MODULE" in messages and "MODEL_SIZE" in messages


def test_mistakes_say_what_to_do(call, folder, tmp_path):
    code, _, _, messages = call(tmp_path / "nothing")
    assert code == 2 and "there is no folder" in messages and "try: " in messages
    code, _, _, messages = call("")
    assert code == 2 and "there is no folder ''" in messages
    if importlib.util.find_spec("lm_eval") is None:
        code, _, _, messages = call(folder, PYTHONPATH="")
        assert code == 2 and "lm_eval is not installed" in messages and "pip install" in messages
    code, _, _, messages = call(folder, PYTHON="/no/such/python")
    assert code == 2 and "there is no /no/such/python" in messages


def test_a_run_is_converted_once(call, tmp_path, _pool, monkeypatch):
    run, tokenizer = tmp_path / "run", tmp_path / "tokenizer"
    folders = ["--run-dir", str(run), "--save", str(run / "checkpoint")]
    flags = ["--train-iters", "1", "--lr-warmup-iters", "0", "--mixer-module", ""]
    _pool.run(1, train, argv(["gla", "softmax"], *folders, *flags, moe=False))
    write_tokenizer(tokenizer)
    code, told, _, messages = call(run / "checkpoint" / "iter_0000001", TOKENIZER=str(tokenizer))
    target = run / "hf" / "iter_0000001"
    assert code == 0, messages
    assert json.loads(options(told)["--model_args"])["pretrained"] == str(target)
    assert "converted to" in messages
    assert (target / "modeling_linear_moe.py").is_file() and (target / "tokenizer.json").is_file()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    script = in_this_process()
    before = (target / "config.json").stat().st_mtime_ns
    assert script.hugging_face_folder(str(run), None) == target
    assert (target / "config.json").stat().st_mtime_ns == before
    later = time.time() + 5
    os.utime(next((run / "checkpoint" / "iter_0000001").iterdir()), (later, later))
    with pytest.raises(ValueError, match="was written after"):
        script.hugging_face_folder(str(run), None)
    (target / "tokenizer_config.json").unlink()
    os.utime(target / "config.json", (later, later))
    with pytest.raises(ValueError, match="has no tokenizer"):
        script.hugging_face_folder(str(run), None)


def in_this_process():
    """The part of the script that is Python."""
    spec = importlib.util.spec_from_file_location("hugging_face_folder", ROOT / "eval/hugging_face_folder.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

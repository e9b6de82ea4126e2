"""The mixer of ``docs/new_mixer.md``, outside the package: it passes the contract, trains, resumes and generates."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from linear_moe.bench.plans import plan_model
from linear_moe.launch.environment import variables
from linear_moe.launch.megatron_args import training_arguments
from linear_moe.lsm import __main__ as listing
from linear_moe.lsm import registry
from tests.launch.plans import make_plan, message
from tests.training.tiny import losses, train

REPOSITORY = Path(__file__).parents[2]
DOCUMENT = (REPOSITORY / "docs" / "new_mixer.md").read_text()
MODULE = "my_package.scalar_decay"
OPTION = "--scalar-decay-longest-memory"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path, of this process and of the workers, with the document's file in it."""
    path = tmp_path / "mixers" / "my_package" / "scalar_decay.py"
    (text,) = re.findall(r"`my_package/scalar_decay\.py`:\n\n```python\n(.*?)```", DOCUMENT, re.DOTALL)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "mixers"))
    return tmp_path / "mixers"


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """At first and afterwards the mixer is unknown, and its module not imported."""
    forget()
    try:
        yield
    finally:
        forget()


def forget() -> None:
    for name in ("scalar_decay", "mom_scalar_decay"):
        registry._MIXERS.pop(name, None)
    for name in ("my_package", MODULE):
        sys.modules.pop(name, None)


def in_shell(command: str, folder: Path) -> subprocess.CompletedProcess:
    """A command of the document, with this interpreter and the folder on its path."""
    path = f"{folder}:{REPOSITORY}:{os.environ['PYTHONPATH']}"
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = command.replace(".venv/bin/python", sys.executable)
    return subprocess.run(
        command, shell=True, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300
    )


def command_of(start: str) -> str:
    (line,) = [line for line in DOCUMENT.splitlines() if line.startswith(start)]
    return line


def test_it_passes_the_contract(folder):
    """The command of the document, on the parts that need no other process."""
    parts = ("scan", "segments", "tables", "gates")
    files = " ".join(f"tests/contract/test_contract_{part}.py" for part in parts)
    command = command_of("CONTRACT_MODULES=").replace("tests/contract ", f"{files} ")
    done = in_shell(f"{command} -q -p no:cacheprovider", folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 40, done.stdout[-500:]
    assert "skipped" not in done.stdout


def test_it_is_listed(folder, capsys):
    with as_before():
        assert listing.main(command_of(".venv/bin/python -m linear_moe.lsm").split()[3:]) == 0
    lines = {line.split(" ")[0]: line for line in capsys.readouterr().out.splitlines()}
    for part in ("diagonal decay", " 128x128 ", " all ", "docs/new_mixer.md"):
        assert part in lines["scalar_decay"]
    assert " 5 x 128x128 " in lines["mom_scalar_decay"]


def train_outside(rank: int, world: int, argv: list[str]) -> None:
    with as_before():
        train(rank, world, argv)


def generate_outside(rank: int, world: int, run: Path) -> tuple[list[int], list[float], int]:
    """In a process that does not know the mixer; config.json says where it is."""
    from linear_moe.inference.generate import generate
    from linear_moe.inference.load import load_model

    with as_before():
        assert MODULE not in sys.modules
        loaded = load_model(run)
        mixers = [getattr(layer.self_attention, "mixer", None) for layer in loaded.model.decoder.layers]
        lengths = [mixer.cfg.longest_memory for mixer in mixers if mixer is not None]
        return generate(loaded, [[3, 1, 4, 1, 5]], max_new_tokens=6)[0], lengths, loaded.iteration


def test_it_trains_resumes_and_generates(folder, gloo, tmp_path):
    """The variables of the document; the launcher reads the file, without importing it."""
    shown = dict(
        re.findall(r'\b([A-Z_]+)=("[^"]*"|\S+)', command_of("MIXER_MODULES=") + command_of("EXTRA_ARGS="))
    )
    assert set(shown) == {"MIXER_MODULES", "LA_MODULE", "LAYER_TYPE_LIST", "EXTRA_ARGS"} <= set(variables())
    shown["EXTRA_ARGS"] = shown["EXTRA_ARGS"].strip('"')
    small = {"SEQ_LEN": "32", "BATCH_SIZE": "1", "GLOBAL_BATCH_SIZE": "2", "PR": "fp32", "EVAL_ITERS": "0"}
    where = {"OUTPUT_BASEPATH": str(tmp_path), "RUN_NAME": "run", **small, **shown}
    plan = make_plan(**where, TRAIN_ITERS="3")
    assert plan.kinds == (*["scalar_decay"] * 3, "softmax") and MODULE not in sys.modules
    gloo(1, train_outside, training_arguments(plan))
    assert len(losses(tmp_path / "run")) == 3
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "run"))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["architecture"]["mixer_options"] == {"scalar_decay": {"longest_memory": 2048.0}}

    text, lengths, iteration = gloo(1, generate_outside, tmp_path / "run")[0]
    assert (len(text), lengths, iteration) == (6, [2048.0] * 3, 3)

    assert message(**where, TRAIN_ITERS="5") == ""
    gloo(1, train_outside, training_arguments(make_plan(**where, TRAIN_ITERS="5")))
    assert len(losses(tmp_path / "run")) == 5
    other = message(**where | {"EXTRA_ARGS": f"{OPTION} 64"}, TRAIN_ITERS="5")
    assert f"{OPTION}: 2048 -> 64" in other, other


def test_a_mixture_of_its_memories_comes_with_it(folder, gloo, tmp_path):
    small = {"SEQ_LEN": "32", "BATCH_SIZE": "1", "GLOBAL_BATCH_SIZE": "2", "PR": "fp32", "EVAL_ITERS": "0"}
    where = {"OUTPUT_BASEPATH": str(tmp_path), "RUN_NAME": "run", "SAVE_INTERVAL": "0", **small}
    plan = make_plan(MIXER_MODULES=MODULE, LA_MODULE="mom_scalar_decay", TRAIN_ITERS="2", **where)
    gloo(1, train_outside, training_arguments(plan))
    assert len(losses(tmp_path / "run")) == 2


def test_a_mixture_that_cannot_be_is_refused_with_the_reason(folder):
    """Before the start, which reads the file without importing it: memories share the query, and here is none."""
    path = folder / "my_package" / "scalar_decay.py"
    path.write_text(path.read_text().replace("*self.qkv()", 'Projection("v", 128)'))
    with as_before():
        found = message(MIXER_MODULES=MODULE, LA_MODULE="mom_scalar_decay")
    assert found.startswith("unknown mixer 'mom_scalar_decay'")
    assert "\n  why: scalar_decay has no mixture of memories: memories share the query" in found


def test_it_can_be_counted(folder):
    """The model of ``tools/count_parameters.py --mixer-module``."""
    plan = plan_model("qwen2", "tiny", "scalar_decay", "LN", mixer_modules=MODULE)
    assert plan.kinds == ("scalar_decay", "softmax") * 2
    words = training_arguments(plan)
    assert words[words.index("--mixer-module") + 1] == MODULE


def test_options_are_checked(folder):
    with as_before():
        registry.import_mixers(MODULE)
        config = registry.get("scalar_decay").Config
        with pytest.raises(ValueError, match=r"(?s)^longest_memory.*\n  why: .*\n  try: 512"):
            config(hidden_size=16, num_heads=2, head_dim=8, longest_memory=0.5)


def test_modules_that_are_not_there(folder, monkeypatch):
    missing = message(MIXER_MODULES="my_package.another", LA_MODULE="another")
    assert missing.startswith("MIXER_MODULES=my_package.another is not there.\n  why: ")
    assert "my_package/another.py" in missing and "\n  try: PYTHONPATH=" in missing
    unknown = message(LA_MODULE="scalar_decay")
    assert "unknown mixer 'scalar_decay'" in unknown
    with pytest.raises(ValueError, match=r"(?s)^mixer module 'my_package.another' .*\n  why: .*\n  try: "):
        registry.import_mixers("my_package.another")
    with as_before(), pytest.raises(ValueError, match=r"(?s)registered twice\n  why: .*\n  try: "):
        registry.import_mixers(MODULE)
        sys.modules.pop(MODULE)
        registry.import_mixers(MODULE)

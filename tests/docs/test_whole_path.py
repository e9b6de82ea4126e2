"""README's section "The whole path", executed: its shell commands in order, then its Python, on what a user brings."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
STAND_IN = "import json, pathlib, sys\npathlib.Path('asked.json').write_text(json.dumps(sys.argv[1:]))\n"
"""For lm_eval, whose tasks need a network; ``tests/eval/test_lm_eval.py`` runs the harness itself."""


def blocks(language: str) -> list[str]:
    """The section's blocks of code."""
    section = re.search(r"^## The whole path\n(.*?)^## ", (REPOSITORY / "README.md").read_text(), re.M | re.S)
    assert section is not None
    return re.findall(rf"^```{language}\n(.*?)^```", section[1], re.M | re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """A copy of the repository by links, so that what the commands write stays out of it, with a user's two files."""
    made = tmp_path_factory.mktemp("repository")
    for name in ("docs", "eval", "examples", "linear_moe", "scripts", "tools"):
        (made / name).symlink_to(REPOSITORY / name)
    python = made / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (made / "packages" / "lm_eval").mkdir(parents=True)
    (made / "packages" / "lm_eval" / "__init__.py").touch()
    (made / "packages" / "lm_eval" / "__main__.py").write_text(STAND_IN)
    texts = [{"text": f"def add_{i}(a, b):\n    return a + b + {i}\n" * 4} for i in range(60)]
    chats = [{"instruction": f"{i} + 1?", "output": str(i + 1)} for i in range(20)]
    for name, lines in (("mine", texts), ("chats", chats)):
        (made / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    yield made


def execute(command: list[str], folder: Path, packages: str = "") -> str:
    """What it writes, on a CPU, with ``packages`` on Python's path and an environment that is empty otherwise."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    settings = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    path = ":".join(filter(None, [packages, os.environ["PYTHONPATH"]]))
    settings |= {"HF_MODULES_CACHE": str(folder / "modules"), "PYTHONPATH": path}
    done = subprocess.run(
        command,
        cwd=folder,
        env=kept | settings,
        capture_output=True,
        text=True,
        timeout=500,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_command_works(folder: Path):
    (commands,) = blocks("sh")
    shown = execute(["sh", "-euc", commands], folder, f"{folder}:{folder / 'packages'}")
    assert "step      4/4" in shown and shown.count("\ndef main():") == 1, shown
    for run in ("mine", "mine-chat"):
        assert {"config.json", "metrics.jsonl", "checkpoint"} <= {
            p.name for p in (folder / "output" / run).iterdir()
        }
    asked = json.loads((folder / "asked.json").read_text())
    model = json.loads(asked[asked.index("--model_args") + 1])
    assert (Path(model["pretrained"]).name, model["trust_remote_code"]) == ("mine-hf", True)

    (lines,) = blocks("python")
    assert len(lines.strip().splitlines()) <= 5, "three lines of transformers, and one to see that they work"
    text = execute([sys.executable, "-c", lines], folder)  # where this package is not installed, without it
    assert text.startswith("def main():")


def test_settings_that_are_tiny_are_in_the_table():
    (commands,) = blocks("sh")
    table = "".join(
        line for line in (REPOSITORY / "README.md").read_text().splitlines() if line.startswith("| ")
    )
    named = set(re.findall(r"\b([A-Z_]{2,})=", commands)) - {"CHAT_TEMPLATE"}
    assert named <= set(re.findall(r"`([A-Z_]{2,})`", table))
    assert (REPOSITORY / "docs" / "finetune.md").read_text().count("CHAT_TEMPLATE") > 0

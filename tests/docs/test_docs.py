"""What the documents say is there: commands, files, variables, messages, names."""

import importlib
import re
import subprocess
from pathlib import Path

import pytest

from linear_moe.launch.environment import variables
from linear_moe.model.families import FAMILIES
from tests.launch.plans import message

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
WORDS = " ".join(path.read_text() for path in DOCUMENTS)


def test_make_targets_exist():
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test", "lint", "test-gpu"} <= targets
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=REPOSITORY, check=True, capture_output=True)


def test_files_that_are_named_exist():
    named = set(re.findall(r"\b(?:examples|tools|scripts|linear_moe|tests|docs)/[\w/.-]+\.\w+", README))
    assert len(named) > 5
    assert [path for path in sorted(named) if not (REPOSITORY / path).exists()] == []


def test_options_of_tools_exist():
    for tool, rest in re.findall(r"python (tools/\w+\.py)([^\n]*)", README):
        source = (REPOSITORY / tool).read_text()
        if elsewhere := re.search(r"from ([\w.]+) import main\b", source):
            source += (REPOSITORY / f"{elsewhere[1].replace('.', '/')}.py").read_text()
        for option in re.findall(r"--[a-z-]+", rest):
            assert f'"{option}"' in source, (tool, option)


def test_the_table_names_every_variable():
    table = "".join(line for line in README.splitlines() if line.startswith("| "))
    assert set(re.findall(r"`([A-Z_]{2,})`", table)) == set(variables())


def test_every_size_is_in_the_table_of_its_family():
    text = (REPOSITORY / "docs" / "families.md").read_text()
    for family in FAMILIES.values():
        for size in family.sizes:
            assert re.search(rf"^\| {family.name} \| {re.escape(size)} \|", text, re.MULTILINE), size


def test_the_message_shown_is_the_message_printed():
    shown = re.search(r"```\nlinear_moe: (.*?)\n```", README, re.DOTALL)
    assert shown is not None
    assert message(TP="2", CP="2", SEQ_LEN="132", GPUS_PER_NODE="4") == shown[1]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\blinear_moe(?:\.\w+)+", WORDS))))
def test_dotted_names_import(name: str, gloo):
    gloo(1, import_dotted, name)  # in a worker: the training modules switch their process to the CPU platform


def import_dotted(rank: int, world: int, name: str) -> None:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            found = getattr(found, attribute)
        return
    raise AssertionError(name)


def test_nothing_names_a_package_registry():
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    hosts = ("py" + "pi.org", "python" + "hosted.org", "download.py" + "torch.org")
    for path in filter(None, tracked):
        file = REPOSITORY / path
        if file.is_file():
            text = file.read_text(errors="replace")
            assert not any(host in text for host in hosts), path


def test_every_finetuning_script_is_named():
    text = (REPOSITORY / "docs" / "finetune.md").read_text()
    scripts = {path.name for path in (REPOSITORY / "examples").glob("*/run_finetune_*.sh")}
    missing = {name for name in scripts if name not in text}
    assert missing <= {"run_finetune_mcore_llama_withGA.sh"}, missing  # its second name in the earlier system

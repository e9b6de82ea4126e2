"""``docs/design.md`` against the sources: which package imports which, the map of files, the public kernels."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from linear_moe import kernels

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "linear_moe"
DESIGN = (REPOSITORY / "docs" / "design.md").read_text()

BELOW = {
    "field_docs": set(),
    "kernels": set(),
    "data": set(),
    "lsm": {"kernels", "field_docs"},
    "parallel": {"kernels"},
    "model": {"kernels", "lsm", "parallel"},
    "training": {"kernels", "lsm", "model", "data"},
    "inference": {"kernels", "lsm", "model", "data", "training"},
    "checkpoint": {"kernels", "lsm", "model", "data", "training", "inference"},
    "launch": {"model.families", "model.pattern", "checkpoint", "data", "field_docs"},
    "bench": {"kernels", "lsm", "model", "data", "training", "inference", "checkpoint", "launch"},
}
"""What each package may import when it is imported itself."""

INSIDE_FUNCTIONS = {
    ("inference", "checkpoint.importing"),
    ("launch", "lsm"),
    ("launch", "model.mixer_options"),
}
"""What it may import later, besides."""

MEGATRON = {"model", "training", "inference", "checkpoint", "bench", "data"}
"""Packages that may know Megatron; ``data`` inside functions only."""


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, with what it takes from it, and whether only when a function is called."""
    tree = ast.parse(path.read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    later = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, id(node) in later) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((f"{node.module}.{name.name}", id(node) in later) for name in node.names)


def within(module: str, allowed: set[str]) -> bool:
    return any(f"{module}.".startswith(f"{name}.") for name in allowed)


@pytest.mark.parametrize("package", sorted(BELOW))
def test_imports_go_one_way(package: str):
    wrong = []
    for path in [PACKAGE / f"{package}.py", *(PACKAGE / package).rglob("*.py")]:
        for module, is_later in imports(path) if path.exists() else ():
            top, _, rest = module.partition(".")
            later = {name for mine, name in INSIDE_FUNCTIONS if mine == package and is_later}
            if top == "linear_moe" and rest and not within(rest, {package, *BELOW[package], *later}):
                wrong.append((path.name, module))
            if top == "megatron" and (package not in MEGATRON or (package == "data" and not is_later)):
                wrong.append((path.name, module))
    assert wrong == []


def test_every_package_is_in_the_table():
    assert set(BELOW) == {path.stem for path in PACKAGE.iterdir() if path.name[0] not in "_."}


def test_mixers_do_not_import_mixers():
    files = {path.stem: path for path in (PACKAGE / "lsm").glob("*.py")}
    mixers = {name for name, path in files.items() if "\n@register(" in path.read_text()}
    assert {"gla", "mamba2", "rwkv7"} <= mixers
    modules = {f"linear_moe.lsm.{name}" for name in mixers}
    for name in mixers:
        assert not [module for module, _ in imports(files[name]) if within(module, modules)], name


def test_the_files_of_the_map_are_there():
    layout = re.search(r"^## Layout\n\n```\n(.*?)^```", DESIGN, re.MULTILINE | re.DOTALL)
    assert layout is not None
    folder, missing = PACKAGE, []
    for line in layout[1].splitlines():
        if found := re.match(r"(  )?(\w+)/", line):
            folder = (PACKAGE if found[1] else REPOSITORY) / found[2]
            missing += [] if folder.is_dir() else [str(folder)]
        names = re.findall(r"[\w*]+\.(?:py|sh)\b", line)
        missing += [name for name in names if not [*folder.glob(name), *PACKAGE.glob(name)]]
    assert missing == []


def test_the_public_kernels_are_called_as_shown():
    shown = re.findall(r"^o, state = (\w+)\((.*)\)$", DESIGN, re.MULTILINE)
    assert len(shown) == 3
    for name, arguments in shown:
        found = []
        for parameter in inspect.signature(getattr(kernels, name)).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and "*" not in found:
                found.append("*")
            has_default = parameter.default is not parameter.empty
            found.append(f"{parameter.name}={parameter.default}" if has_default else parameter.name)
        assert ", ".join(found) == arguments, name

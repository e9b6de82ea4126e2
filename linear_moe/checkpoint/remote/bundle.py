"""The code of an exported folder: the model's files, the mixers and torch kernels they use, as flat modules.

``transformers`` copies a model's file and the files that lines ``from .name import ..`` in it name, from one folder.
So every module of this package that the model imports is written beside it under a flat name, ``linear_moe.lsm.gla`` as
``lsm_gla.py``, and its imports are rewritten; nothing else is changed. Two files are made up: ``lsm.py``, which names
the mixers of this model, and ``kernels.py``, which prefers the kernels of an installed ``linear_moe``.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from linear_moe import lsm

PACKAGE = "linear_moe"
MODEL = f"{PACKAGE}.checkpoint.remote.model"
ENTRY = (f"{MODEL}.modeling_linear_moe", f"{MODEL}.configuration_linear_moe")
MADE_UP = {f"{PACKAGE}.lsm": "lsm", f"{PACKAGE}.kernels": "kernels"}
"""Packages of which we write another ``__init__``, and its flat name."""

NO_FUSED = """

# Fused kernels come with the package linear_moe; where it is installed, kernels.py takes them, and all of this, there.
BACKENDS = {op: tuple(x for x in table if x.name in ("chunked", "reference")) for op, table in BACKENDS.items()}
"""
"""Ends the list of backends in a folder."""

LISTED = """
if False:  # transformers copies the files that it finds in lines like these, older versions in this file only
"""
"""Ends the model's file."""


def write_code(directory: Path, config: Mapping[str, Any]) -> None:
    """Write the code that opens the model of ``config``.

    Args:
        directory: of the export.
        config: as :func:`~linear_moe.checkpoint.remote.describe.hf_config` made it; ``mixers`` is read.
    """
    for name, text in sorted(bundle(tuple(config.get("mixers") or ())).items()):
        (directory / f"{name}.py").write_text(text)


def bundle(kinds: tuple[str, ...]) -> dict[str, str]:
    """Every file by its flat name, for a model with these mixers."""
    mixers = {lsm.get(kind).__module__ for kind in kinds}
    sources: dict[str, str] = {}
    kernels = _path(f"{PACKAGE}.kernels").read_text()
    index = _path(f"{PACKAGE}.lsm").read_text()
    waiting = [*ENTRY, *sorted(mixers)]
    for text in (kernels, index):
        waiting += [names.source for _, names in _imports(text, mixers) if names.objects]
    while waiting:
        module = waiting.pop()
        if module not in sources and module not in MADE_UP:
            sources[module] = source = _path(module).read_text()
            waiting += [name for _, names in _imports(source, mixers) for name, _ in names.modules]
            waiting += [names.source for _, names in _imports(source, mixers) if names.objects]
    files = {flat(module): _rewritten(module, source, mixers) for module, source in sources.items()}
    files["kernels_dispatch"] += NO_FUSED
    files["kernels"] = _kernels_file(kernels)
    files["lsm"] = _lsm_file(index, mixers)
    entries = {flat(module) for module in ENTRY}
    files[flat(ENTRY[0])] += LISTED + "".join(
        f"    from .{name} import *\n" for name in sorted({*files} - entries)
    )
    files[flat(ENTRY[1])] += _digest(files)
    return files


def _digest(files: Mapping[str, str]) -> str:
    """Ends the config's file: transformers takes folders of one name whose configs have the same code for one model,
    and would build the second one from the files of the first."""
    text = "".join(text for _, text in sorted(files.items()))
    return f"\n# The code of this folder: {hashlib.sha256(text.encode()).hexdigest()[:16]}\n"


def flat(module: str) -> str:
    """The name of a module in the folder."""
    if module in MADE_UP:
        return MADE_UP[module]
    if module.startswith(f"{MODEL}."):
        return module.removeprefix(f"{MODEL}.")
    if module.startswith(f"{PACKAGE}."):
        return module.removeprefix(f"{PACKAGE}.").replace(".", "_")
    return f"lsm_{module.replace('.', '_')}"  # a mixer of somebody else's


class _Names:
    """One import statement: which modules it names, and which objects of its source."""

    def __init__(self, node: ast.ImportFrom, ours: set[str]) -> None:
        self.source = node.module or ""
        found = [(f"{node.module}.{alias.name}", alias) for alias in node.names]
        is_module = {
            name: name in ours or (name.startswith(PACKAGE) and _is_module(name)) for name, _ in found
        }
        self.modules = [(name, alias.asname or alias.name) for name, alias in found if is_module[name]]
        self.objects = [alias for name, alias in found if not is_module[name]]


def _imports(source: str, mixers: set[str]) -> Iterator[tuple[ast.ImportFrom, _Names]]:
    """Imports that must be rewritten, wherever in the file they stand."""
    for node in _statements(source):
        inside = node.module == PACKAGE or (node.module or "").startswith(f"{PACKAGE}.")
        if inside or node.module in mixers:
            yield node, _Names(node, mixers)


@cache
def _statements(source: str) -> list[ast.ImportFrom]:
    """Imports from modules; a file is parsed once, whatever the number of models that are exported."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == PACKAGE for alias in node.names), ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node)
    return found


def _rewritten(module: str, source: str, mixers: set[str]) -> str:
    lines = source.splitlines()
    for node, names in _imports(source, mixers):
        indent = " " * node.col_offset
        new = [f"{indent}from . import {_as(flat(name), alias)}" for name, alias in names.modules]
        if names.objects:
            objects = ", ".join(_as(alias.name, alias.asname) for alias in names.objects)
            line = f"{indent}from .{flat(names.source)} import {objects}"
            if len(line) > 110:
                body = "".join(f"{indent}    {part},\n" for part in objects.split(", "))
                line = f"{indent}from .{flat(names.source)} import (\n{body}{indent})"
            new.insert(0, line)
        assert node.end_lineno is not None
        # As many entries as before: the other statements stay where they were found.
        lines[node.lineno - 1 : node.end_lineno] = ["\n".join(new)] + [""] * (node.end_lineno - node.lineno)
    text = "\n".join(lines)
    return f"{_header(f'{module.replace(".", "/")}.py')}{_without_gaps(text)}\n"


def _without_gaps(text: str) -> str:
    """At most two empty lines in a row."""
    while "\n\n\n\n" in text:
        text = text.replace("\n\n\n\n", "\n\n\n")
    return text


def _as(name: str, alias: str | None) -> str:
    return name if alias in (None, name) else f"{name} as {alias}"


def _kernels_file(source: str) -> str:
    """Of the package's own list of kernels: the same from where it is installed, or from here."""
    own = [
        (flat(names.source), [alias.name for alias in names.objects]) for _, names in _imports(source, set())
    ]
    listed = sorted(name for _, found in own for name in found)
    installed = "".join(f"        {name},\n" for name in listed)
    here = "".join(f"    from .{module} import {', '.join(found)}\n" for module, found in own)
    return (
        f"{_header(f'{PACKAGE}/kernels/__init__.py')}"
        f'"""The kernels of an installed ``{PACKAGE}``, fused on a GPU; else chunked torch from this folder."""\n\n'
        f"try:\n    from {PACKAGE}.kernels import (\n{installed}    )\nexcept ImportError:\n{here}\n"
        f"__all__ = {json.dumps(listed)}\n"
    )


def _lsm_file(source: str, mixers: set[str]) -> str:
    """Of the package's own: what mixers are made of first, since they may import it from here."""
    own = [names for _, names in _imports(source, set()) if names.objects]
    base = "".join(f"from .{flat(x.source)} import {', '.join(a.name for a in x.objects)}\n" for x in own)
    exported = sorted(alias.name for names in own for alias in names.objects)
    imports = "".join(f"from . import {flat(module)}\n" for module in sorted(mixers, key=flat))
    return (
        f"{_header(f'{PACKAGE}/lsm/__init__.py')}"
        '"""The mixers of this model, registered by name."""\n\n'
        f"{base}{imports}\n"
        f"add_mixtures()\n\n__all__ = {json.dumps(exported)}\n"
    )


def _header(source: str) -> str:
    return f"# Written by the export of linear_moe, from {source}: change it there.\n"


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _path(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    return Path(spec.origin)

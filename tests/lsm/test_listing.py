"""``python -m linear_moe.lsm`` names every registered mixer, with the figures that the mixers themselves give."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from linear_moe import lsm
from linear_moe.lsm import __main__ as listing
from linear_moe.lsm import registry
from linear_moe.lsm.flags import options_of
from linear_moe.lsm.gla import GatedLinearAttention

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def hermit():
    """A registered mixer that cannot do everything, and remembers two kinds of matrices."""

    class Hermit(GatedLinearAttention):
        source = "arXiv:0000.00000, " + ", ".join(f"section {n}" for n in range(1, 20))
        unsupported = {"CP": "it looks at the whole sequence", "decode": "and at the future"}  # noqa: RUF012

        def memory_shapes(self):
            return ((64, 32), (64, 32), (64, 33))

    registry._MIXERS["hermit"] = Hermit
    try:
        yield Hermit
    finally:
        del registry._MIXERS["hermit"]


def mixer(name):
    kind = lsm.get(name)
    return kind(kind.Config.from_model(hidden_size=1024, num_heads=8, head_dim=128))


def test_every_mixer_with_its_own_figures():
    found = {e.name: e for e in listing.entries()}
    assert tuple(found) == lsm.names()
    for name, e in found.items():
        assert e.memory_shapes == mixer(name).memory_shapes(), name
        assert e.elements == sum(math.prod(shape) for shape in mixer(name).memory_shapes()), name
        assert e.heads == mixer(name).cfg.num_heads, name
        assert (e.family, e.source) == (lsm.get(name).family, lsm.get(name).source)
    assert found["gated_deltanet"].memory == "128x128" and found["gated_deltanet"].elements == 16384
    assert found["gla"].memory == "64x128", "half-width keys by default"


def test_the_table_has_every_figure(hermit):
    found = listing.entries()
    text = listing.table(found)
    assert all(len(line) <= listing.WIDTH for line in text.splitlines())
    assert text.isascii() and "planned" not in text
    head, *lines = text.splitlines()
    for e in found:
        (line,) = [line for line in lines if line.startswith(f"{e.name} ")]
        for figure in (e.family, e.memory, f"{e.elements:,}", e.source.split(",")[0]):
            assert figure in line, (e.name, figure)
        column = line[head.index("layouts") :]
        limits = f"all but {', '.join(e.unsupported)}  " if e.unsupported else "all  "
        assert column.startswith(limits), (e.name, column)
    assert all(
        f" {layout} {meaning}" in " ".join(text.split()) for layout, meaning in listing.LAYOUTS.items()
    )
    (line,) = [line for line in lines if line.startswith("hermit ")]
    assert "2 x 64x32 + 64x33" in line and "all but CP, decode" in line
    assert "hermit, CP: it looks at the whole sequence" in lines
    assert "section 19" in text, "a long source is wrapped, not cut"


def test_layouts_that_do_not_exist_are_refused(hermit):
    hermit.unsupported = {"CPP": "a typo would hide a restriction"}
    with pytest.raises(ValueError, match=r"'CPP', which is no layout\n.*\n  try: PP$"):
        registry.register("recluse")(hermit)
    assert "recluse" not in registry.names()


def test_the_command(capsys):
    """In a process of its own: nothing but the table, the same as from within; and JSON."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "linear_moe.lsm"]
    done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == listing.table(listing.entries()) + "\n"
    assert listing.main(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(lsm.names())
    for row in rows:
        shapes = [list(shape) for shape in mixer(row["name"]).memory_shapes()]
        assert (row["memory_shapes"], row["elements"]) == (shapes, sum(math.prod(s) for s in shapes))
        assert set(row["layouts"]) == set(listing.LAYOUTS) - set(row["unsupported"])


def test_options_with_their_meaning_and_default(capsys):
    assert listing.main(["gla", "mom_kda"]) == 0
    lines = [re.sub("  +", "  ", line).strip() for line in capsys.readouterr().out.splitlines()]
    assert "--gla-gate-rank  Waist of the low-rank gate projection. [16]" in lines
    assert "--gla-norm-eps  Epsilon of the output norm. [the model's]" in lines
    assert any(line.startswith("--mom-kda-topk  Memories per token. [2]") for line in lines), "of both bases"
    assert listing.main(["no_such"]) == 2 and "unknown mixer" in capsys.readouterr().err
    for name in lsm.names():
        assert all(text.partition(" [")[0] for _, _, text in options_of(lsm.get(name).Config)), name


@pytest.mark.parametrize(
    ("source", "why"),
    [("import no_such_thing", "No module named 'no_such_thing'"), ("def f(:", "invalid syntax")],
)
def test_a_module_that_does_not_import(source: str, why: str, tmp_path, monkeypatch, capsys):
    """It is there: another folder to look for it in would not help."""
    (tmp_path / "half_a_mixer.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert listing.main(["--mixer-module", "half_a_mixer"]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("linear_moe: mixer module 'half_a_mixer' cannot be imported\n  why: ")
        and why in error
    )
    assert error.endswith('\n  try: python -c "import half_a_mixer", which shows the line\n')


def test_a_module_that_is_not_there(capsys):
    assert listing.main(["--mixer-module", "no_such.mixer"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("linear_moe: mixer module 'no_such.mixer' cannot be imported\n  why: ")
    assert "\n  try: PYTHONPATH=<the folder that holds no_such>" in error

"""Every mixer trains in every family, and ``docs/matrix.md`` says exactly what ran here and in the tests of layouts.

``LINEAR_MOE_WRITE_MATRIX=1 pytest tests/docs/test_matrix.py`` writes the document; without, it has to be what ran.
"""

import math
import os
import textwrap
from pathlib import Path
from typing import Any

import pytest

from linear_moe import lsm
from linear_moe.launch.environment import read_environment
from linear_moe.launch.megatron_args import training_arguments
from linear_moe.launch.plan import plan_run
from linear_moe.model.families import FAMILIES
from linear_moe.model.pattern import SOFTMAX
from tests.training import test_family_layouts as families_in_layouts
from tests.training import test_layouts as mixers_in_layouts
from tests.training.parity import DENSE, LAYOUTS, STACKS, impossible, write_documents
from tests.training.tiny import metrics
from tests.workers import Pool

DOCUMENT = Path(__file__).parents[2] / "docs" / "matrix.md"
MIXERS = [*lsm.names(), SOFTMAX]
STEPS = 2


def command_line(family: str, mixer: str, data: str, folder: Path) -> list[str]:
    """A layer of the mixer and one of softmax attention, as the family's run script would start them."""
    variables = {
        **{"MODEL_SIZE": "tiny", "LA_MODULE": mixer, "LAYER_TYPE_LIST": "LN", "EXTRA_ARGS": "--num-layers 2"},
        **{"SEQ_LEN": "32", "BATCH_SIZE": "1", "GLOBAL_BATCH_SIZE": "1", "PR": "fp32", "AC": "none"},
        **{"TRAIN_ITERS": str(STEPS), "SAVE_INTERVAL": "0", "EVAL_ITERS": "0", "DATASET_PATH": data},
        **{"TOKENIZER": "null", "OUTPUT_BASEPATH": str(folder), "RUN_NAME": mixer},
    }
    argv = training_arguments(plan_run(read_environment(variables, family), cuda_devices=0))
    unused = argv.index("--tensorboard-dir")  # its writer takes as long as a step
    return argv[:unused] + argv[unused + 2 :]


def train_all(rank: int, world: int, family: str, data: str, folder: Path) -> dict[str, str]:
    """What came of each mixer: "" or the error."""
    from linear_moe.training import pretrain
    from tests.workers import leave_model_parallel

    found = {}
    for mixer in MIXERS:
        try:
            pretrain.main(command_line(family, mixer, data, folder))
            found[mixer] = ""
        except Exception as error:
            found[mixer] = f"{type(error).__name__}: {error}"
        leave_model_parallel()
    return found


@pytest.fixture(scope="module")
def data(_pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = str(tmp_path_factory.mktemp("documents") / "tokens")
    _pool.run(1, write_documents, prefix)
    return prefix


@pytest.fixture(scope="module")
def ran(_pool: Pool, data: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``ran(family)``: the mixers that trained in it, with their steps, and the errors of others."""
    cache: dict[str, dict[str, Any]] = {}

    def of(family: str) -> dict[str, Any]:
        if family not in cache:
            folder = tmp_path_factory.mktemp(family)
            (errors,) = _pool.run(1, train_all, family, data, folder)
            cache[family] = {m: error or metrics(folder / m) for m, error in errors.items()}
        return cache[family]

    return of


def trained(result: str | list[dict[str, Any]]) -> bool:
    """Two steps of finite losses, the first that of a model that knows nothing, with gradients."""
    if isinstance(result, str) or len(result) != STEPS:
        return False
    first = abs(result[0]["lm_loss"] - math.log(1024)) < 0.3
    return first and all(math.isfinite(s["lm_loss"]) and 0 < s["grad_norm"] < math.inf for s in result)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixer_trains_in_a_family(ran, family: str, mixer: str):
    assert trained(ran(family)[mixer]), ran(family)[mixer]


def table(head: list[str], rows: dict[str, list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|:-:" * (len(head) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join([name, *cells]) + " |" for name, cells in rows.items()])


def prose(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False)


def layouts_of_mixers() -> dict[str, list[str]]:
    """By mixer: T where ``make test`` compares a layout with one process, P where ``make parity`` does."""

    def cell(mixer: str, layout: str) -> str:
        marks = {
            "T" if packing in mixers_in_layouts.SELECTED.get((layout, stack), []) else "P"
            for stack, kinds in STACKS.items()
            for packing in ("plain", "packed")
            if mixer in kinds and not impossible(layout, stack, packing)
        }
        return "T" if "T" in marks else "P" if marks else "-"

    return {mixer: [cell(mixer, layout) for layout in LAYOUTS] for mixer in MIXERS}


def layouts_of_families() -> dict[str, list[str]]:
    """The same by family; the models of the mixers' table are of ``qwen2``."""
    rows = {"qwen2": ["T" if "T" in column else "P" for column in zip(*layouts_of_mixers().values())]}
    selected = {(family, layout) for family, _, layout in families_in_layouts.SELECTED}
    every = {(family, layout) for family, _, layout in families_in_layouts.ALL}
    for family in FAMILIES:
        keys = [(family, layout) for layout in LAYOUTS]
        rows.setdefault(family, ["T" if key in selected else "P" if key in every else "-" for key in keys])
    return rows


def document(ran: Any) -> str:
    cells = {m: ["T" if trained(ran(f)[m]) else "**no**" for f in FAMILIES] for m in MIXERS}
    mixers = f"""
The layout against one process: losses of six steps and the gradient of every parameter. The mixer is in a stack with
others, of the kind of qwen2, with experts but for {" and ".join(DENSE)} (Megatron refuses experts under TP without SP).
A number stands behind each dimension; some cells pack documents, some do not. RWKV7 refuses `recompute-layers`: its
first layer hands a value to the later ones."""
    models = ", ".join(" ".join(model) for model in families_in_layouts.STACKS)
    families = f"""
The same comparison of shrunken models: {models}; and of those of the table above, which are of the kind of qwen2."""
    return f"""# What was run

Written by `tests/docs/test_matrix.py`, whose test fails when this file says anything else than what ran.

T: in `make test`. P: in `make parity`, which runs T, too. -: not run; that it would fail is not said.

## Mixer x family

T: {STEPS} steps of `pretrain()` with the command line of the family's run script, `MODEL_SIZE=tiny`, one layer of
the mixer and one of softmax attention.

{table(["mixer", *FAMILIES], cells)}

## Mixer x layout

{prose(mixers)}

{table(["mixer", *LAYOUTS], layouts_of_mixers())}

## Family x layout

{prose(families)}

{table(["family", *LAYOUTS], layouts_of_families())}
"""


def test_the_document_is_what_ran(ran):
    text = document(ran)
    if os.environ.get("LINEAR_MOE_WRITE_MATRIX") == "1":
        DOCUMENT.write_text(text)
    assert DOCUMENT.read_text() == text, (
        "LINEAR_MOE_WRITE_MATRIX=1 pytest tests/docs/test_matrix.py writes it"
    )

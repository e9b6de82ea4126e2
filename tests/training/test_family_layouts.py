"""Layouts train the same model of a family: what no other model here has is cut over ranks and stages."""

from collections.abc import Callable
from functools import cache

import pytest

from linear_moe.model.families import FAMILIES, megatron_arguments
from tests.model.family_models import shrunken
from tests.training.parity import DENSE, LAYOUTS, Comparison, rows_of
from tests.training.test_layouts import EVERY
from tests.training.tiny import ARGUMENTS
from tests.workers import Pool

TRAINING = ARGUMENTS[ARGUMENTS.index("--seq-length") :]
STACKS = {
    # compressed attention in the first, dense layer; groups of experts; two shared experts
    ("deepseek_v2", "A21B"): ["softmax", "gla", "softmax", "gated_deltanet"],
    # a shared expert with a gate, a bias in mixers too
    ("qwen2", "A14B"): ["gla", "softmax"],
    # attention with an output gate and norms that count from one; two values for each key
    ("qwen3_next", "80B-A3B"): ["gated_deltanet", "softmax"],
    # one table of embeddings, at both ends of the pipeline
    ("llama3", "1B"): ["gated_deltanet", "softmax"],
    # no feed-forward blocks
    ("mamba2", "130M"): ["mamba2", "softmax"],
    ("mixtral", "8x7B"): ["gla", "softmax", "gated_deltanet", "softmax"],
}
SELECTED = [
    ("deepseek_v2", "A21B", "cp2"),
    ("deepseek_v2", "A21B", "tp2-pp2"),
    ("deepseek_v2", "A21B", "ep2"),
    ("qwen2", "A14B", "tp2-sp"),
    ("qwen3_next", "80B-A3B", "tp2-sp"),
    ("llama3", "1B", "pp2"),
    ("mamba2", "130M", "tp2-pp2"),
]


def possible(family: str, size: str) -> list[str]:
    """Layouts for experts, or those for none; two layers have no four stages."""
    is_moe, layers = FAMILIES[family].sizes[size].is_moe, len(STACKS[family, size])
    fits = [name for name in LAYOUTS if layers % 4 == 0 or "vpp" not in name]
    return [name for name in fits if (name not in DENSE if is_moe else "ep2" not in name)]


ALL = [(*model, layout) for model in STACKS for layout in possible(*model)]
CASES = ALL if EVERY else SELECTED


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, _pool: Pool) -> Callable[..., Comparison]:
    """What layouts are compared with, by family, size and rows."""

    @cache
    def of(family: str, size: str, rows: int) -> Comparison:
        kinds = STACKS[family, size]
        model = [*megatron_arguments(FAMILIES[family], shrunken(FAMILIES[family].sizes[size])), *TRAINING]
        if "--moe-layer-freq" in model:
            model[model.index("--moe-layer-freq") + 1] = f"([0]+[1]*{len(kinds) - 1})"
        if family == "qwen3_next":
            model += ["--gated-deltanet-values-per-key", "2"]
        model += ["--expert-tensor-parallel-size", "1"] if "--num-experts" in model else []
        return Comparison(_pool, tmp_path_factory.mktemp("runs"), kinds, moe=False, model=model, rows=rows)

    return of


@pytest.mark.parametrize("family,size,layout", CASES, ids=["-".join(case) for case in CASES])
def test_a_layout_trains_the_same_model(compared: Callable, family: str, size: str, layout: str):
    compared(family, size, rows_of(layout)).check(*LAYOUTS[layout], layout)

"""Every layout trains the same model, whatever its mixers: losses of six steps and the gradient of every parameter.

Several mixers share a stack, so that a mixer's values and gradients also pass through the others.
"""

import os
from collections.abc import Callable
from functools import cache

import pytest

from linear_moe import lsm
from tests.training.parity import DENSE, LAYOUTS, STACKS, Comparison, impossible, rows_of, write_documents
from tests.workers import Pool

EVERY = os.environ.get("LINEAR_MOE_ALL_LAYOUTS") == "1"
"""All combinations (make parity) instead of a selection (make test)."""

SELECTED = {
    # every mixer, where a mixer meets other ranks
    **{("tp2-sp", stack): ["plain"] for stack in STACKS},
    **{("cp2", stack): ["packed"] for stack in STACKS},
    **{("pp2", stack): ["plain"] for stack in ("rnns", "linear", "memories", "more memories")},
    # some, where layouts meet each other
    ("cp2", "hybrid"): ["plain", "packed"],
    ("cp4", "hybrid"): ["plain"],
    ("ep2", "memories"): ["packed"],
    ("pp2-ep2", "hybrid"): ["packed"],
    ("tp2-cp2", "rnns"): ["packed"],
    ("tp2-no-sp", "rnns"): ["plain"],
    ("tp2-no-sp", "memories"): ["packed"],
    ("pp2-vpp2", "rnns"): ["plain"],
    ("dp2-pp2-distributed-optimizer", "rnns"): ["plain"],
    ("dp2-distributed-optimizer", "hybrid"): ["plain"],
    ("dp2-pp2-overlap", "rnns"): ["plain"],
    ("dp2-pp2-overlap", "memories"): [
        "plain"
    ],  # waits for every gradient: also of a table that no layer reads
    ("recompute-mixers", "rnns"): ["plain"],
    ("recompute-layers", "memories"): ["packed"],
    ("recompute-layers", "recomputed"): ["plain"],
    ("output-chunks", "hybrid"): ["plain"],
    ("tp2-sp-output-chunks", "hybrid"): ["packed"],
    ("tp2-no-sp-output-chunks", "hybrid"): ["plain"],
}

CASES = [
    (stack, layout not in DENSE, packing, layout)
    for stack in STACKS
    for packing in ("plain", "packed")
    for layout in LAYOUTS
    if (EVERY or packing in SELECTED.get((layout, stack), [])) and not impossible(layout, stack, packing)
]


def test_every_mixer_is_in_a_stack():
    assert {kind for stack in STACKS.values() for kind in stack} == {*lsm.names(), "softmax"}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory, _pool: Pool) -> str:
    prefix = str(tmp_path_factory.mktemp("documents") / "tokens")
    _pool.run(1, write_documents, prefix)
    return prefix


@pytest.fixture(scope="module")
def compared(
    documents: str, tmp_path_factory: pytest.TempPathFactory, _pool: Pool
) -> Callable[..., Comparison]:
    """What layouts are compared with, by stack, experts, packing and rows.

    No parametrised fixture: pytest keeps one value of it, and orders cases such that most are made several times.
    """

    @cache
    def of(stack: str, moe: bool, packing: str, rows: int) -> Comparison:
        folder = tmp_path_factory.mktemp("comparison")
        return Comparison(_pool, folder, stack, moe, documents if packing == "packed" else None, rows=rows)

    return of


@pytest.mark.parametrize(
    "stack,moe,packing,layout",
    CASES,
    ids=[f"{layout}-{stack}-{'moe' if moe else 'dense'}-{packing}" for stack, moe, packing, layout in CASES],
)
def test_a_layout_trains_the_same_model(compared: Callable, stack: str, moe: bool, packing: str, layout: str):
    compared(stack, moe, packing, rows_of(layout, packing)).check(*LAYOUTS[layout], layout)

"""Every layout trains the same model: losses of 6 steps and the gradient of every parameter equal one process's.

Gradients are read where they arrive, after Megatron's reduction: one step of plain gradient descent at learning rate
1000 without clipping moves every weight by 1000 times its gradient, so the weights' rounding does not matter.
"""

import os
from pathlib import Path

import pytest
import torch

from tests.training.tiny import ARGUMENTS, DISTRIBUTED_OPTIMIZER, EXPERTS, losses, train, whole

PATTERNS = {
    "linear_attention": ["linear_attention"] * 4,
    "gla": ["gla"] * 4,
    "gated_deltanet": ["gated_deltanet"] * 4,
    "hybrid": ["gated_deltanet", "gla", "linear_attention", "softmax"],
}

LAYOUTS = {
    "tp2-sp": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
    "pp2-vpp2": (2, ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"]),
    "ep2": (2, ["--expert-model-parallel-size", "2"]),
    "cp2": (2, ["--context-parallel-size", "2"]),
    "cp4": (4, ["--context-parallel-size", "4"]),
    "tp2-cp2": (
        4,
        ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--context-parallel-size", "2"],
    ),
    "pp2-ep2": (4, ["--pipeline-model-parallel-size", "2", "--expert-model-parallel-size", "2"]),
    "dp2-distributed-optimizer": (2, DISTRIBUTED_OPTIMIZER),
}

DENSE = {"tp2-no-sp": (2, ["--tensor-model-parallel-size", "2"])}

# Every layout with all mixers and softmax in one stack; of the pure stacks those where a mixer meets other ranks. All
# combinations: LINEAR_MOE_ALL_LAYOUTS=1 (make parity).
EVERY = os.environ.get("LINEAR_MOE_ALL_LAYOUTS") == "1"
PURE = ("tp2-sp", "cp2")
CASES = [
    (layout, pattern, layout not in DENSE)
    for layout in LAYOUTS | DENSE
    for pattern in PATTERNS
    if EVERY or pattern == "hybrid" or layout in PURE
]


def arguments(pattern: str, moe: bool, run: Path, *extra: str) -> list[str]:
    experts = EXPERTS if moe else []
    return [*ARGUMENTS, *experts, "--layer-kinds", ",".join(PATTERNS[pattern]), "--run-dir", str(run), *extra]


GRADIENT = ["--optimizer", "sgd", "--sgd-momentum", "0", "--lr", "1000", "--min-lr", "1000"]
GRADIENT += ["--lr-warmup-iters", "0", "--clip-grad", "0", "--weight-decay", "0", "--train-iters", "1"]
GRADIENT += ["--no-save-optim"]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, _pool):
    """Per pattern: the checkpoint that all start from, and one process's losses and gradients from it."""
    cache: dict = {}

    def of(pattern: str, moe: bool):
        if (pattern, moe) not in cache:
            folder = tmp_path_factory.mktemp(f"{pattern}-{moe}")
            start = folder / "start"
            save = ["--train-iters", "1", "--lr-warmup-iters", "0", "--save", str(start)]
            _pool.run(1, train, arguments(pattern, moe, folder / "begin", *save))
            load = ["--pretrained-checkpoint", str(start)]
            _pool.run(1, train, arguments(pattern, moe, folder / "run", *load))
            cache[pattern, moe] = (
                start,
                losses(folder / "run"),
                gradients(_pool, 1, pattern, moe, folder, load),
            )
        return cache[pattern, moe]

    return of


def gradients(pool, world: int, pattern: str, moe: bool, folder: Path, extra: list[str]):
    argv = arguments(pattern, moe, folder / "gradient", *extra, *GRADIENT)
    return whole([seen["after"] for seen in pool.run(world, train, argv, True)])


@pytest.mark.parametrize("layout,pattern,moe", CASES)
def test_a_layout_trains_the_same_model(layout, pattern, moe, single, gloo, _pool, tmp_path):
    start, expected_losses, expected_weights = single(pattern, moe)
    world, flags = (LAYOUTS | DENSE)[layout]
    extra = [*flags, "--pretrained-checkpoint", str(start)]
    gloo(world, train, arguments(pattern, moe, tmp_path / "run", *extra))
    torch.testing.assert_close(
        torch.tensor(losses(tmp_path / "run")), torch.tensor(expected_losses), rtol=1e-5, atol=0
    )
    if layout != "dp2-distributed-optimizer":  # it shards Adam only; its gradients are those of its losses
        weights = gradients(_pool, world, pattern, moe, tmp_path, extra)
        assert weights.keys() == expected_weights.keys()
        for key, expected in expected_weights.items():
            error = (weights[key] - expected).norm() / expected.norm()
            assert error <= 1e-4, f"gradient of {key}: relative error {error:.1e}"

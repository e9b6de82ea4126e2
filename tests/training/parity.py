"""What every layout is compared with: one process's losses, gradients and figures of the memories, from one start.

Losses are those of float32. Gradients are read where they arrive, after Megatron's reduction, of the same model in
float64 (float32 where Megatron insists), so that rounding hides nothing: one step of Adam with epsilon 1 and a learning
rate of 1000 moves a weight by 1000 g / (|g| + 1).
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.training.tiny import (
    ARGUMENTS,
    DISTRIBUTED_OPTIMIZER,
    EXPERTS,
    checkpoint,
    losses,
    metrics,
    train,
    whole,
)

STACKS = {
    # The first value of RWKV7 passes through chunks of the pipeline that have no such layer; every stage has HGRN2.
    "rnns": ["rwkv7", "gla", "hgrn2", "kda", "rwkv7", "mamba2", "hgrn2", "rwkv6"],
    "linear": [
        *("deltanet", "gsa", "based", "retention", "gated_deltanet", "rebased", "lightning_attention"),
        "linear_attention",
    ],
    # The second stage has the table of HGRN2 and no layer that reads it.
    "memories": [
        *("mom_hgrn2", "mom_gla", "mom_hgrn2", "mom_kda"),
        *("mom_gated_deltanet", "mom_gsa", "mom_based", "softmax"),
    ],
    "more memories": [
        *("mom_deltanet", "mom_lightning_attention", "mom_linear_attention", "softmax"),
        *("mom_rebased", "mom_retention", "gla", "mom_linear_attention"),
    ],
    "hybrid": ["gated_deltanet", "gla", "linear_attention", "softmax"],
    # RWKV7 refuses to recompute layers: those of its stack without it.
    "recomputed": ["hgrn2", "kda", "mamba2", "hgrn2", "rwkv6"],
}

TP2, SP = ["--tensor-model-parallel-size", "2"], ["--sequence-parallel"]
PP2 = ["--pipeline-model-parallel-size", "2"]
VPP2 = ["--num-virtual-stages-per-pipeline-rank", "2"]
CP2, EP2 = ["--context-parallel-size", "2"], ["--expert-model-parallel-size", "2"]

# Buckets so small that every module waits for weights and gradients of its own.
OVERLAP = [
    *DISTRIBUTED_OPTIMIZER,
    "--overlap-grad-reduce",
    "--overlap-param-gather",
    "--ddp-bucket-size",
    "1000",
]
RECOMPUTE_LAYERS = ["--recompute-granularity", "full", "--recompute-method", "uniform"]
RECOMPUTE_LAYERS += ["--recompute-num-layers", "1"]

OUTPUT_CHUNKS = ["--output-chunk-size", "24"]

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "tp2-sp": (2, [*TP2, *SP]),
    "pp2": (2, PP2),
    "pp2-vpp2": (2, [*PP2, *VPP2]),
    "ep2": (2, EP2),
    "cp2": (2, CP2),
    "cp4": (4, ["--context-parallel-size", "4"]),
    "tp2-cp2": (4, [*TP2, *SP, *CP2]),
    "tp2-pp2": (4, [*TP2, *SP, *PP2]),
    "pp2-cp2": (4, [*PP2, *CP2]),
    "pp2-ep2": (4, [*PP2, *EP2]),
    "dp2": (2, []),
    "dp4": (4, []),
    "dp2-distributed-optimizer": (2, DISTRIBUTED_OPTIMIZER),
    "dp2-pp2-distributed-optimizer": (4, [*PP2, *DISTRIBUTED_OPTIMIZER]),
    "dp2-pp2-overlap": (4, [*PP2, *OVERLAP]),
    "dp2-pp2-vpp2-distributed-optimizer": (4, [*PP2, *VPP2, *DISTRIBUTED_OPTIMIZER]),
    "tp2-no-sp": (2, TP2),
    "recompute-mixers": (1, ["--lsm-recompute"]),
    "recompute-layers": (1, RECOMPUTE_LAYERS),
    "output-chunks": (1, OUTPUT_CHUNKS),
    "tp2-sp-output-chunks": (2, [*TP2, *SP, *OUTPUT_CHUNKS]),
    "tp2-no-sp-output-chunks": (2, [*TP2, *OUTPUT_CHUNKS]),
}

DENSE = ("tp2-no-sp", "tp2-no-sp-output-chunks")
"""Layouts that Megatron refuses with experts."""


def impossible(layout: str, stack: str, packing: str) -> bool:
    """Cases that cannot be: two micro-batches are too few, and RWKV7 refuses to recompute layers.

    Or that say nothing new: the output layer does not know what is below it, and mixers are in a stack of their own.
    """
    if layout.endswith("output-chunks"):
        return stack != "hybrid"
    if stack == "recomputed":
        return layout != "recompute-layers"
    few = packing == "packed" and layout in ("dp4", "dp2-pp2-vpp2-distributed-optimizer")
    return few or (layout == "recompute-layers" and "rwkv7" in STACKS[stack])


def rows_of(layout: str, packing: str = "plain") -> int:
    """Sequences of a micro-batch: with one, two data-parallel ranks have two such each, and a pipeline four."""
    return 1 if packing == "plain" and any(axis in layout for axis in ("dp", "ep", "pp")) else 2


GRADIENT = [
    *("--adam-eps", "1", "--lr", "1000", "--min-lr", "1000", "--lr-warmup-iters", "0", "--clip-grad", "0"),
    *("--weight-decay", "0", "--train-iters", "1", "--no-save-optim"),
]

START = ["--train-iters", "3", "--lr", "1e-2", "--min-lr", "1e-2", "--lr-warmup-iters", "0"]
"""Weights far from their initial ones: RWKV7 starts with outputs of zero, behind which nothing has a gradient."""


def write_documents(rank: int, world: int, prefix: str) -> None:
    """Token files of many short documents, some of one token; in a worker."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    draw = torch.Generator().manual_seed(11)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(128))
    for n in torch.randint(0, 40, (400,), generator=draw).tolist():
        builder.add_document(
            torch.tensor([*torch.randint(0, 127, (n,), generator=draw).tolist(), 127]), [n + 1]
        )
    builder.finalize(f"{prefix}.idx")


class Comparison:
    """One stack of layers, with or without experts and packing: its single process, and what layouts give.

    Args:
        pool: workers.
        folder: for all runs.
        stack: name of the layers, or the layers.
        moe: with experts.
        documents: prefix of token files to pack; ``None``: not packed.
        extra: more flags.
        model: command line in place of the usual one, without the layers.
        rows: sequences of a micro-batch, of four in a step.
    """

    def __init__(
        self,
        pool: Any,
        folder: Path,
        stack: str | list[str],
        moe: bool,
        documents: str | None = None,
        extra: tuple[str, ...] = (),
        model: list[str] = ARGUMENTS,
        rows: int = 2,
    ) -> None:
        kinds = STACKS[stack] if isinstance(stack, str) else stack
        self.pool, self.folder = pool, folder
        self.argv = [*model, *(EXPERTS if moe else [])]
        self.argv += ["--layer-kinds", ",".join(kinds), "--num-layers", str(len(kinds))]
        for kind in {kind for kind in kinds if kind.startswith("mom_")}:
            self.argv += [f"--{kind.replace('_', '-')}-aux-loss-coeff", "0.1"]  # not lost in rounding
        # A memory's first token reads w / (w + eps), w a square: with the default its gradient shows how q . k rounds.
        self.argv += ["--rebased-eps", "0.01", "--mom-rebased-eps", "0.01", "--micro-batch-size", str(rows)]
        if documents is not None:
            self.argv.remove("--mock-data")
            self.argv += ["--data-path", documents, "--split", "1,0,0", "--dataloader-inter-document-masking"]
        self.argv += extra
        start = folder / "start"
        self._train(1, "begin", *START, "--save", str(start))
        self.load = ["--pretrained-checkpoint", str(start)]
        self.weights = pool.run(1, checkpoint_weights, start / "iter_0000003")[0]
        self.steps = self.run(1, [], "single")
        self._changes: dict[bool, dict[str, torch.Tensor]] = {}

    def _train(self, world: int, name: str, *extra: str, **options: bool) -> list[dict[str, Any]]:
        argv = [*self.argv, "--run-dir", str(self.folder / name), *extra]
        return self.pool.run(world, partial(train, **options), argv)

    def changes(self, exact: bool) -> dict[str, torch.Tensor]:
        """:meth:`gradients` of one process."""
        if exact not in self._changes:
            self._changes[exact] = self.gradients(1, [], f"single gradient {exact}", exact)
        return self._changes[exact]

    def run(self, world: int, flags: list[str], name: str) -> list[dict[str, Any]]:
        """The figures of six steps."""
        self._train(world, name, *flags, *self.load)
        assert len(losses(self.folder / name)) == 6
        return metrics(self.folder / name)

    def gradients(self, world: int, flags: list[str], name: str, exact: bool) -> dict[str, torch.Tensor]:
        """How far one step moves every weight."""
        flags = [
            flag for flag in flags if flag != "--overlap-param-gather"
        ]  # new weights would come a step later
        extra = [*flags, *self.load, *GRADIENT]
        seen = self._train(world, name, *extra, observe=True, exact=exact)
        after = whole([rank["after"] for rank in seen])
        assert after.keys() == self.weights.keys()
        return {key: after[key] - self.weights[key] for key in after}

    def check(self, world: int, flags: list[str], name: str) -> None:
        """Losses, gradients, their norm and the memories' figures of a layout are those of one process."""
        steps = self.run(world, flags, name)
        for figure, tolerance in {"lm_loss": 1e-5, "grad_norm": 1e-3, "memory_balance": 1e-4}.items():
            if figure in self.steps[0]:
                mine, expected = (torch.tensor([step[figure] for step in run]) for run in (steps, self.steps))
                torch.testing.assert_close(
                    mine, expected, rtol=tolerance, atol=0, msg=lambda m, f=figure: f"{f}: {m}"
                )
        for step, expected in zip(steps, self.steps, strict=True):
            assert step.get("memory_layers") == expected.get("memory_layers")
            for load, expected_load in zip(
                step.get("memory_load", []), expected.get("memory_load", []), strict=True
            ):
                torch.testing.assert_close(torch.tensor(load), torch.tensor(expected_load), rtol=0, atol=1e-6)
        # Megatron's distributed optimizer refuses float64, and virtual stages mix it with what is always float32.
        exact = not {DISTRIBUTED_OPTIMIZER[0], VPP2[0]} & set(flags)
        changes, expected = self.gradients(world, flags, f"{name} gradient", exact), self.changes(exact)
        errors = {key: relative_error(changes[key], expected[key], self.weights[key]) for key in changes}
        limit = 2e-6 if exact else 1e-3
        wrong = [f"{key}: relative error {e:.1e}" for key, e in errors.items() if not e <= limit]
        assert not wrong, "gradients of " + "; ".join(wrong)


def relative_error(change: torch.Tensor, expected: torch.Tensor, weight: torch.Tensor | None = None) -> float:
    """NaN where there is nothing to compare.

    A ``weight`` that is float32 in any model moves by rounded steps, one of which may be large beside a small gradient:
    so much of a difference is not counted.
    """
    difference = (change - expected).abs()
    if weight is not None and change.dtype == torch.float32:
        step = torch.finfo(torch.float32).eps * torch.maximum(weight.abs(), (weight + expected).abs())
        difference = (difference - step).clamp(min=0)
    return float(difference.norm() / expected.norm())


def checkpoint_weights(rank: int, world: int, folder: Path) -> dict[str, torch.Tensor]:
    """Every weight in a checkpoint, by key; in a worker."""
    tensors, _ = checkpoint(folder)
    return {key: value for key, value in tensors.items() if not key.startswith("optimizer.")}

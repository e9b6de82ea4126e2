"""Finetuning of a tiny model in the pool of workers: its command line, its losses, what one step does to weights."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from linear_moe.data.instructions.prepare import Prepared
from tests.training.parity import GRADIENT
from tests.training.tiny import ARGUMENTS, EXPERTS, losses, train, whole

MODEL = [flag for flag in ARGUMENTS if flag != "--mock-data"]


def arguments(
    run: Path, samples: Prepared, tokenizer: str, kinds: str, *extra: str, moe: bool = False
) -> list[str]:
    """Command line of a finetuning run; the model's vocabulary is that of ``chat_tokenizer``."""
    start = MODEL.index("--tokenizer-type")
    text = [
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        tokenizer,
        "--padded-vocab-size",
        "384",
    ]
    return [
        *MODEL[:start],
        *MODEL[start + 6 :],
        *text,
        *(EXPERTS if moe else []),
        *("--layer-kinds", kinds, "--num-layers", str(kinds.count(",") + 1)),
        *("--instruction-data", str(samples.folder), "--run-dir", str(run)),
        *extra,
    ]


def one_step(pool: Any, world: int, argv: list[str], run: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of the first step, and every weight after it: in float64, moved by 1000 times a small gradient."""
    seen = pool(world, partial(train, observe=True, exact=True), [*argv, *GRADIENT])
    return losses(run)[0], whole([rank["after"] for rank in seen])

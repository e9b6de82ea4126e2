"""Defects D14 and D18 of the earlier system (its data and its run script); and none of D1-D18 is forgotten here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from linear_moe.data.tokenizer import train_tokenizer
from linear_moe.launch.megatron_args import training_arguments
from tests.launch.plans import make_plan
from tests.workers import with_model_parallel

# D14: labels that end a document were masked, so the model never learned to stop


@pytest.fixture(scope="module", params=["own padding token", "padding is the end token"])
def corpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, bool]:
    """A tokenizer and token files of many short documents; Qwen2's base models pad with their end token."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    folder: Path = tmp_path_factory.mktemp("documents")
    info = train_tokenizer(["one two three four five six seven"] * 3, 270, str(folder / "tokenizer"))
    is_ambiguous = request.param == "padding is the end token"
    if is_ambiguous:
        config = folder / "tokenizer" / "tokenizer_config.json"
        end = re.search(r'"eos_token": "([^"]+)"', config.read_text())
        assert end
        config.write_text(re.sub(r'("pad_token": )"[^"]+"', rf'\1"{end[1]}"', config.read_text()))
    builder = IndexedDatasetBuilder(str(folder / "tokens.bin"), dtype=DType.optimal_dtype(info.vocab_size))
    generator = np.random.default_rng(0)
    for length in generator.integers(2, 15, size=200):
        builder.add_document([*generator.integers(10, 250, size=length).tolist(), info.eod], [length + 1])
    builder.finalize(str(folder / "tokens.idx"))
    return str(folder / "tokenizer"), str(folder / "tokens"), is_ambiguous


def labels_and_masks(rank: int, world: int, argv: list[str]) -> tuple[list[Any], int, int]:
    """The first batches that a run with this command line trains on, the end of a document, and the padding."""
    from megatron.training import get_tokenizer
    from megatron.training.training import build_train_valid_test_data_iterators

    from linear_moe.training.data import get_batch, train_valid_test_datasets
    from linear_moe.training.pretrain import loss_func, prepare_arguments

    args = prepare_arguments(argv)
    args.iteration = args.consumed_train_samples = args.consumed_valid_samples = 0
    with with_model_parallel():
        train, _, _ = build_train_valid_test_data_iterators(train_valid_test_datasets)
        found = []
        for _ in range(4):
            batch = get_batch(train)
            ends = (batch.labels == get_tokenizer().eod).float()
            total, num_tokens, _ = loss_func(batch.loss_mask, ends)
            found.append((batch.labels, batch.loss_mask, float(total), int(num_tokens)))
        return found, get_tokenizer().eod, get_tokenizer().pad


@pytest.mark.parametrize("pack", ["false", "true"])
def test_d14_the_end_of_a_document_is_in_the_loss(gloo, corpus, tmp_path, pack):
    """D14: end-of-sequence labels were masked, by their id or as padding.

    Here the run script's own command line trains on every one of them. (Pretraining data: finetuning comes later.)
    """
    tokenizer, prefix, is_ambiguous = corpus
    where = {"DATASET_PATH": prefix, "TOKENIZER": tokenizer, "OUTPUT_BASEPATH": str(tmp_path), "PACK": pack}
    plan = make_plan(**where, SEQ_LEN="32", BATCH_SIZE="2", GLOBAL_BATCH_SIZE="2", TRAIN_ITERS="8", PR="fp32")
    found, eod, pad = gloo(1, labels_and_masks, training_arguments(plan))[0]
    assert (pad == eod) == is_ambiguous
    assert sum(int((labels == eod).sum()) for labels, *_ in found) > 10
    for labels, mask, total, num_tokens in found:
        assert isinstance(labels, Tensor) and labels.shape == (2, 32)
        assert torch.equal(mask, torch.ones_like(mask))
        assert (total, num_tokens) == (int((labels == eod).sum()), labels.numel())


# D18: WARMUP_TOKENS / GLOBAL_BATCH_SIZE / SEQ_LEN, rounded down, is 0 for the defaults


@pytest.mark.parametrize(
    "variables,steps",
    [
        ({}, 1),
        ({"WARMUP_TOKENS": "1"}, 1),
        ({"WARMUP_TOKENS": "16384"}, 1),
        ({"WARMUP_TOKENS": "16385"}, 2),
        ({"WARMUP_TOKENS": "0"}, 0),
    ],
)
def test_d18_some_tokens_of_warm_up_are_some_steps(variables, steps):
    """D18: 10000 tokens of warm-up at 8 x 2048 tokens a step were 0 steps, so there was none by default.

    Here they are rounded up, on the command line that starts the training.
    """
    flags = training_arguments(make_plan(**{"SEQ_LEN": "2048", "TRAIN_ITERS": "100", **variables}))
    assert flags[flags.index("--global-batch-size") + 1] == "8"
    assert flags[flags.index("--lr-warmup-iters") + 1] == str(steps)


def test_every_defect_has_its_test():
    """D1-D18, by name, with the defect in the docstring."""
    texts = [path.read_text() for path in sorted(Path(__file__).parent.glob("test_*.py"))]
    found = {
        int(number)
        for text in texts
        for number, named in re.findall(
            r'^def test_d(\d\d)_\w+\(.*?\).*?:\n    """D(\d+)', text, re.MULTILINE
        )
        if int(number) == int(named)
    }
    assert found == set(range(1, 19))

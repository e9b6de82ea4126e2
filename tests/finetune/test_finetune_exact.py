"""Packed samples give the loss and the gradients of samples alone, whatever the mixers and the layout; in float64."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from linear_moe.data.instructions.packing import pack
from tests.finetune.chat import chat_tokenizer, mixed_messages, prepared, write_lines
from tests.finetune.runs import arguments, one_step
from tests.training.parity import (
    LAYOUTS,
    RECOMPUTE_LAYERS,
    START,
    VPP2,
    checkpoint_weights,
    relative_error,
)
from tests.training.tiny import metrics, train
from tests.workers import Pool

KINDS = "gated_deltanet,mamba2,rwkv6,softmax"
"""Delta rule with convolution, scalar decay with groups, token shift, attention: ways for one sample to leak."""
LENGTH = 64
NO_BALANCE = ["--moe-aux-loss-coeff", "0.0"]
"""Its gradient is a property of micro-batches, not of samples."""


class Data:
    """Samples, and weights from which all runs start."""

    def __init__(self, pool: Pool, folder: Path) -> None:
        self.pool, self.folder = pool, folder
        self.tokenizer = chat_tokenizer(folder / "tokenizer")
        lines = write_lines(folder / "mixed.jsonl", mixed_messages(24))
        self.samples = prepared(self.tokenizer, lines, folder / "cache", LENGTH)
        self.packs = pack(self.samples.lengths, LENGTH, 1234)
        start = folder / "start"
        argv = self.arguments("begin", *START, "--save", str(start))
        pool.run(1, train, argv)
        self.load = ["--pretrained-checkpoint", str(start)]
        self.weights = pool.run(1, checkpoint_weights, start / "iter_0000003")[0]
        self.alone = self.step("alone", 1, "--no-instruction-packing", batch=self.samples.report.samples)

    def arguments(self, name: str, *extra: str) -> list[str]:
        run = self.folder / name
        return arguments(run, self.samples, self.tokenizer, KINDS, *NO_BALANCE, *extra, moe=True)

    def step(self, name: str, world: int, *extra: str, batch: int) -> tuple[float, dict[str, torch.Tensor]]:
        """Loss and gradients of one step over all samples."""
        argv = self.arguments(name, *self.load, "--global-batch-size", str(batch), *extra)
        loss, after = one_step(self.pool.run, world, argv, self.folder / name)
        return loss, {key: after[key] - self.weights[key] for key in after}


@pytest.fixture(scope="module")
def data(tmp_path_factory: Any, _pool: Pool) -> Data:
    return Data(_pool, tmp_path_factory.mktemp("finetune"))


@pytest.mark.parametrize("layout", ["one process", "dp2", "cp2", "tp2-sp", "pp2"])
def test_packed_equals_alone(data: Data, layout: str):
    """One step over all samples, some of them in one sequence, at least one sequence empty; one process and others."""
    assert 8 < data.samples.report.samples > len(data.packs) > 4, "something is packed"
    world, flags = LAYOUTS.get(layout, (1, []))
    batch = len(data.packs) // 2 * 2 + 2
    loss, change = data.step(layout, world, *flags, batch=batch)
    expected_loss, expected = data.alone
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    errors = {key: relative_error(change[key], expected[key], data.weights[key]) for key in expected}
    assert not [f"{key}: {error:.1e}" for key, error in errors.items() if not error <= 2e-6]


def test_packed_equals_alone_for_other_ways_to_leak(data: Data):
    """A first value and bounds that layers share, two scans, positions, and memories with convolutions of their own."""
    kinds = "rwkv7,rwkv7,hgrn2,hgrn2,gsa,retention,mom_kda"
    small = ["--hidden-size", "32", "--ffn-hidden-size", "32", "--num-attention-heads", "2"]

    def go(name: str, *extra: str) -> list[str]:
        run = data.folder / f"others {name}"
        options = [*small, "--mom-aux-loss-coeff", "0", *extra]
        return arguments(run, data.samples, data.tokenizer, kinds, *options)

    start = data.folder / "others start"
    data.pool.run(1, train, go("begin", *START, "--save", str(start)))
    weights = data.pool.run(1, checkpoint_weights, start / "iter_0000003")[0]
    found = []
    for name, batch, extra in (
        ("packed", len(data.packs), []),
        ("alone", data.samples.report.samples, ["--no-instruction-packing"]),
    ):
        argv = go(name, "--pretrained-checkpoint", str(start), "--global-batch-size", str(batch), *extra)
        loss, after = one_step(data.pool.run, 1, argv, data.folder / f"others {name}")
        found.append((loss, {key: after[key] - weights[key] for key in after}))
    (loss, change), (expected_loss, expected) = found
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    errors = {key: relative_error(change[key], expected[key], weights[key]) for key in expected}
    assert not [f"{key}: {error:.1e}" for key, error in errors.items() if not error <= 2e-6]


def test_the_balance_of_experts_weighs_as_much_as_in_pretraining(data: Data):
    """Whatever share of the tokens is learned: the balance adds the same gradient to the routers."""
    folder = data.folder / "all learned"
    shutil.copytree(data.samples.folder, folder)
    learned = np.ones_like(data.samples.learned)
    np.save(folder / "learned.npy", learned)
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps(report | {"learned_tokens": report["tokens"]}))
    assert data.samples.report.learned_tokens < 0.5 * report["tokens"]
    batch = len(data.packs) // 2 * 2 + 2
    added = []
    for samples in (data.samples.folder, folder):
        changes = [
            data.step(
                f"{samples.name} {weight}",
                1,
                *("--instruction-data", str(samples), "--moe-aux-loss-coeff", weight),
                batch=batch,
            )[1]
            for weight in ("0.0", "0.1")
        ]
        added.append({key: changes[1][key] - changes[0][key] for key in changes[0] if "router" in key})
    assert len(added[0]) == 4
    for key in added[0]:
        assert relative_error(added[0][key], added[1][key]) < 0.05, key


def test_padding_is_no_load_of_experts(data: Data):
    """Their balance is that of the samples, however long the sequences that hold them, in every layout."""
    found = {}
    for layout, length in [("one process", 64), ("one process", 96), ("cp2", 96), ("tp2-pp2", 96)]:
        world, flags = LAYOUTS.get(layout, (1, []))
        name = f"{layout} {length}"
        if layout == "tp2-pp2":
            flags = [*flags, *VPP2, *RECOMPUTE_LAYERS]
        options = ["--no-instruction-packing", "--moe-aux-loss-coeff", "0.1", "--lr", "0", "--min-lr", "0"]
        options += [
            "--seq-length",
            str(length),
            "--max-position-embeddings",
            str(length),
            "--train-iters",
            "2",
        ]
        data.pool.run(world, train, data.arguments(name, *data.load, *flags, *options))
        found[name] = [step["moe_load_balancing_loss"] for step in metrics(data.folder / name)]
    expected = found["one process 64"]
    assert len(expected) == 2 and expected[0] != pytest.approx(1, rel=1e-3)
    for name, losses in found.items():
        assert losses == pytest.approx(expected, rel=1e-5), name


def test_padding_is_no_load_of_memories(data: Data):
    """The same of a mixture's; all runs with the weights of the first."""
    found, start = {}, str(data.folder / "memories")
    for layout, length in [("one process", 64), ("one process", 96), ("cp2", 96)]:
        world, flags = LAYOUTS.get(layout, (1, []))
        name = f"memories {layout} {length}"
        options = ["--no-instruction-packing", "--lr", "0", "--min-lr", "0", "--train-iters", "2"]
        options += ["--seq-length", str(length), "--max-position-embeddings", str(length), *flags]
        options += ["--pretrained-checkpoint" if found else "--save", start]
        run = data.folder / name
        data.pool.run(world, train, arguments(run, data.samples, data.tokenizer, "mom_gla,softmax", *options))
        found[name] = [[*step["memory_balance"], *step["memory_load"][0]] for step in metrics(run)]
    expected = found["memories one process 64"]
    assert len(expected) == 2 and expected[0][0] != pytest.approx(1, rel=1e-4)
    for name, steps in found.items():
        for step, of_samples in zip(steps, expected, strict=True):
            assert step == pytest.approx(of_samples, rel=1e-5), name


def test_padding_leaves_the_balance_its_weight_in_every_layout(data: Data):
    """Gradients, those of the balance included, of sequences that are mostly padding: as in one process."""
    options = ["--no-instruction-packing", "--moe-aux-loss-coeff", "0.1"]
    options += ["--seq-length", "96", "--max-position-embeddings", "96"]
    found = {}
    for layout in ("one process", "cp2", "tp2-sp"):
        world, flags = LAYOUTS.get(layout, (1, []))
        batch = data.samples.report.samples
        _, found[layout] = data.step(f"balance {layout}", world, *flags, *options, batch=batch)
    expected = found.pop("one process")
    for layout, change in found.items():
        errors = {key: relative_error(change[key], expected[key], data.weights[key]) for key in expected}
        wrong = [f"{key}: {error:.1e}" for key, error in errors.items() if not error <= 2e-6]
        assert not wrong, f"{layout}: {wrong}"

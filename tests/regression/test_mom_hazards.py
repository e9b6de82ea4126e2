"""Mixtures of memories: defects D8-D10 of the earlier system, and the hazards of the public implementations.

Whole models from a command line, so that nothing here knows how routing, gathering and scattering are done. The truth
is the model that reads one token at a time: it can neither sort, nor pad, nor look ahead. (Hazards: section 3.4 of the
study of the papers.)
"""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_moe import lsm
from tests.inference.models import argv
from tests.regression.whole_models import (
    backward_of_nothing,
    build,
    changed,
    difference,
    logits,
    random_tokens,
    stepwise,
)
from tests.training.tiny import ARGUMENTS, train

MIXTURES = ["mom_gated_deltanet", "mom_gla", "mom_gsa"]
"""The two of the paper, and one with two matrices a memory; all share one file."""

pytestmark = pytest.mark.skipif(
    "mom_gated_deltanet" not in lsm.names(), reason="no mixture of memories is registered"
)

TOKENS = 200
"""More than a sort that is not stable leaves in order (16), and than any block."""

ROUTER = "router"
"""What the checkpoint keys of a router hold."""


def outputs(rank: int, world: int, name: str, train: bool, batches: list[Tensor]) -> list[Tensor]:
    """Logits of each batch, in a model of two layers of one mixture."""
    model = build([name, name], train=train)
    assert any(key.endswith("k_bias") for key, _ in model.named_parameters())
    with torch.no_grad():
        return [logits(model, tokens_BT) for tokens_BT in batches]


def at_once_and_stepwise(
    rank: int, world: int, name: str, length: int, scale: float = 1.0
) -> dict[str, Tensor]:
    model = build([name, name])
    routers = [parameter for key, parameter in model.named_parameters() if ROUTER in key]
    assert routers, [key for key, _ in model.named_parameters()]
    for parameter in routers:
        parameter.data *= scale
    tokens_BT = random_tokens(2, length)
    with torch.no_grad():
        return {
            "by steps": stepwise(model, tokens_BT),
            "eval": logits(model.eval(), tokens_BT),
            "train": logits(model.train(), tokens_BT),
        }


@pytest.mark.parametrize("name", MIXTURES)
def test_d08_tokens_keep_their_order_in_a_memory(gloo, name):
    """D8: a sort that is not stable shuffled the tokens of a memory.

    Here all tokens at once give what one token after the other gives. In training too: there, the public code lets the
    short convolution run over the ends of runs, which mixes them, and evaluation differs from training.
    """
    (found,) = gloo(1, at_once_and_stepwise, name, TOKENS)
    assert difference(found["eval"], found["by steps"]) < 1e-10
    assert difference(found["train"], found["by steps"]) < 1e-10
    assert difference(found["train"], found["eval"]) < 1e-12


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_d09_routes_of_later_tokens_change_nothing(gloo, name, train):
    """D9: padding wrote into memories when q, k, v had a bias, as much of it as later tokens left room for.

    Here, with a bias, outputs before changed tokens stay as they are; also where the short convolution would reach over
    the end of a run into tokens of the same sequence that come later.
    """
    assert "--add-qkv-bias" in ARGUMENTS
    batches, edits = [], [72, 40, 1]
    for batch in (1, 2):
        tokens_BT = random_tokens(batch, 80)
        batches += [tokens_BT, *(changed(tokens_BT, slice(None), slice(place, None)) for place in edits)]
    found = gloo(1, outputs, name, train, batches)[0]
    for batch, (before, *after) in ((1, found[:4]), (2, found[4:])):
        for place, edited in zip(edits, after, strict=True):
            assert difference(edited[:, :place], before[:, :place]) < 1e-12, (batch, place)
            assert difference(edited[:, place], before[:, place]) > 1e-6, (batch, place)


def gradients_of_routers(rank: int, world: int, name: str) -> dict[str, float]:
    model = build([name, name], train=True)
    backward_of_nothing(model, random_tokens(2, 60))
    return {
        key: 0.0 if p.grad is None else p.grad.abs().max().item()
        for key, p in model.named_parameters()
        if ROUTER in key
    }


@pytest.mark.parametrize("name", MIXTURES)
def test_d10_the_balance_of_memories_is_in_the_loss(gloo, name):
    """D10: no loss kept the memories' router balanced.

    Here the router of every layer has a gradient when the language-model loss is multiplied by 0.
    """
    (found,) = gloo(1, gradients_of_routers, name)
    layers = {key.split(".layers.")[1].split(".")[0] for key in found}
    assert layers == {"0", "1"}
    assert all(gradient > 1e-8 for gradient in found.values()), found


@pytest.mark.parametrize("name", MIXTURES)
def test_d10_the_balance_of_memories_is_in_the_log(gloo, tmp_path: Path, name):
    """D10: nothing showed it either. Here every step of ``metrics.jsonl`` has a finite balance and load of memories."""
    run = ["--run-dir", str(tmp_path / "run"), "--train-iters", "2", "--global-batch-size", "2"]
    gloo(1, train, argv([name, name], *run))
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        step = json.loads(line)
        shown = {key: value for key, value in step.items() if "memor" in key or "mom" in key}
        shown.pop("peak_memory_gib")
        assert shown, sorted(step)
        assert all(math.isfinite(x) for x in _numbers(shown)), shown


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [x for part in value.values() for x in _numbers(part)]
    if isinstance(value, list):
        return [x for part in value for x in _numbers(part)]
    return [float(value)]


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_samples_of_a_batch_do_not_meet(gloo, name, train):
    """Runs of two samples lie side by side: the convolution and the memory must stop in between."""
    tokens_BT = random_tokens(3, 50)
    batches = [tokens_BT, changed(tokens_BT, 1), tokens_BT[2:]]
    plain, other, alone = gloo(1, outputs, name, train, batches)[0]
    assert difference(other[[0, 2]], plain[[0, 2]]) < 1e-12
    assert difference(other[1], plain[1]) > 1e-6
    assert difference(plain[2:], alone) < 1e-10


def input_gradient(rank: int, world: int, name: str) -> Tensor:
    """Gradient of the first sample's 21st output in the embedding of every token, ``[B, T]`` by size."""
    no_loss = (f"--{name.replace('_', '-')}-aux-loss-coeff", "0")  # it looks at all tokens, as it should
    model, caught = build([name, name], *no_loss, train=True), []
    model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: caught.append(kwargs["hidden_states"]), with_kwargs=True
    )
    out = logits(model, random_tokens(2, 40))[0, 20].square().sum()
    (gradient_TBD,) = torch.autograd.grad(out, caught)
    return gradient_TBD.abs().amax(-1).T


@pytest.mark.parametrize("name", MIXTURES)
def test_gradients_do_not_look_ahead(gloo, name):
    """Backward as forward: an output has no gradient in later tokens, nor in other samples."""
    (gradient_BT,) = gloo(1, input_gradient, name)
    assert gradient_BT[1].max() == 0 and gradient_BT[0, 21:].max() == 0
    assert (gradient_BT[0, :21] > 0).sum() > 15


@pytest.mark.parametrize("name", MIXTURES)
def test_weights_that_vanish_keep_their_token(gloo, name):
    """The public code counts tokens by weights that are not 0, and sorts by choice: a weight of 0 shifts all others.

    Here a router so sure of itself that its second weight is 0 gives what one token after the other gives.
    """
    (found,) = gloo(1, at_once_and_stepwise, name, 60, 1e5)
    assert difference(found["eval"], found["by steps"]) < 1e-10


def documents_together_and_alone(
    rank: int, world: int, name: str, bounds: list[int]
) -> tuple[Tensor, Tensor]:
    model, tokens_1T = build([name, name], train=True), random_tokens(1, bounds[-1])
    with torch.no_grad():
        together = logits(model, tokens_1T, torch.tensor([bounds], dtype=torch.int32))
        pieces = [logits(model, tokens_1T[:, a:b]) for a, b in itertools.pairwise(bounds)]
    return together, torch.cat(pieces, dim=1)


@pytest.mark.parametrize("name", MIXTURES)
def test_packed_documents_do_not_meet(gloo, name):
    """Documents shorter than the convolution and longer than a block, each routed on its own."""
    together, alone = gloo(1, documents_together_and_alone, name, [0, 1, 3, 40, 41, 120])[0]
    assert difference(together, alone) < 1e-10

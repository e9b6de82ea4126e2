"""Between the start of the forward pass and the optimizer nothing is read on the host, checked without a GPU.

As in tests/inference/test_capture.py: every operation is looked at, and the grouped GEMM of experts has a stand-in.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import pytest
import torch

from linear_moe import lsm
from tests.inference.test_capture import FORBIDDEN, WAITING, Seen, everywhere
from tests.regression.whole_models import build, random_tokens
from tests.training.tiny import ARGUMENTS, DISTRIBUTED_OPTIMIZER, EXPERTS, train

NAMES = lsm.names()
DOCUMENTS = (0, 3, 4, 40, 64)
STEP = [*ARGUMENTS, *EXPERTS, *DISTRIBUTED_OPTIMIZER]
OF_THE_HOST = ("/core/datasets/", "/core/tensor_parallel/random.py")
"""Where Megatron reads tensors that are the CPU's on every platform: samples, and the state of the CPU's generator."""


def refused(name: str, *args: Any, **kwargs: Any) -> None:
    raise AssertionError(f"{name} in a step")


def number_of_documents(cu_seqlens: torch.Tensor | None, batch: int, *others: Any) -> int:
    """The check of documents without the part that is for CPUs only."""
    return batch if cu_seqlens is None else len(cu_seqlens) - 1


def operations(rank: int, world: int, kinds: list[str], packed: bool, flags: tuple[str, ...]) -> list[str]:
    """Names of all operations of a forward and a backward pass; the first pass makes what is made once."""
    import linear_moe.kernels.checks
    import linear_moe.kernels.grouped_linear
    import linear_moe.model.experts
    import linear_moe.model.sequence
    from linear_moe.model.output_loss import loss_in_chunks
    from linear_moe.training.data import documents

    model = build(kinds, *flags, moe=True, train=True, dtype=torch.float32)
    tokens = random_tokens(1, 64) if packed else random_tokens(2, 32)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    params = documents(torch.tensor([DOCUMENTS]) if packed else None, tokens.shape[1])
    mask = torch.ones(tokens.shape)
    seen = Seen()

    def step(chunk: int | None) -> None:
        process = None if chunk is None else loss_in_chunks(chunk)
        losses = model(
            tokens,
            positions,
            None,
            labels=tokens,
            loss_mask=mask,
            packed_seq_params=params,
            output_processor=process,
        )
        (losses * mask).sum().backward()

    with pytest.MonkeyPatch.context() as patch:
        for module in (linear_moe.kernels.grouped_linear, linear_moe.model.experts):
            patch.setattr(module, "can_group", lambda *tensors: True)
            patch.setattr(module, "grouped_linear", everywhere)
        step(None)
        for name in WAITING:
            patch.setattr(torch.Tensor, name, functools.partial(refused, name))
        patch.setattr(linear_moe.kernels.checks, "check_cu_seqlens", number_of_documents)
        patch.setattr(linear_moe.kernels.checks, "check_decay", lambda *arguments: None)  # on CPUs only, too
        patch.setattr(
            linear_moe.model.sequence, "_is_partition", lambda *values: True
        )  # looked at on CPUs only
        with seen:
            step(None)
        # Megatron's loss writes by a mask, which CUDA does as masked_fill, without looking at it.
        names = seen.names - {"index by bool"}
        with seen:
            seen.names.clear()
            step(24)
    return sorted(names | seen.names)


def reads_of_megatron(rank: int, world: int, argv: list[str]) -> list[str]:
    """Where Megatron reads a tensor on the host, from a step's first forward pass to its optimizer."""
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    from linear_moe.training import pretrain

    inside, found = [False], []

    def spied(read: Any) -> Any:
        def method(tensor: torch.Tensor, *args: Any) -> Any:
            caller = sys._getframe(1)
            path = caller.f_code.co_filename
            if inside[0] and "/megatron/" in path and not any(part in path for part in OF_THE_HOST):
                found.append(f"{path}:{caller.f_lineno}")
            return read(tensor, *args)

        return method

    def switches(now: bool, function: Any) -> Any:
        def switched(*args: Any, **kwargs: Any) -> Any:
            inside[0] = now
            return function(*args, **kwargs)

        return switched

    with pytest.MonkeyPatch.context() as patch:
        for name in WAITING:
            patch.setattr(torch.Tensor, name, spied(getattr(torch.Tensor, name)))
        patch.setattr(pretrain, "forward_step", switches(True, pretrain.forward_step))
        patch.setattr(ChainedOptimizer, "step", switches(False, ChainedOptimizer.step))
        train(rank, world, argv)
    assert not inside[0], "the optimizer was not seen"
    return found


LAYOUTS = {
    "one process": [],
    "tp2-sp": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "cp2": ["--context-parallel-size", "2"],
    "pp2": ["--pipeline-model-parallel-size", "2"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatron_reads_nothing_of_a_step_on_the_host(gloo: Any, layout: str) -> None:
    """Of packed documents, whose number differs from micro-batch to micro-batch."""
    flags = ["--layer-kinds", "gla,gated_deltanet,softmax,mom_gla", "--train-iters", "2"]
    flags += ["--dataloader-inter-document-masking", *LAYOUTS[layout]]
    world = 2 if LAYOUTS[layout] else 1
    found = gloo(world, reads_of_megatron, [*STEP, *flags])
    assert found == [[]] * world


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("kinds", [NAMES[i::3] for i in range(3)], ids=range(3))
def test_a_step_reads_nothing_on_the_host(gloo: Any, kinds: list[str], packed: bool) -> None:
    flags = ("--moe-shared-expert-intermediate-size", "32")
    (names,) = gloo(1, operations, [*kinds, "softmax"], packed, flags)
    assert "index_select.default" in names
    assert not [name for name in names if name.split(".")[0] in FORBIDDEN or name in FORBIDDEN], names
    assert "index by bool" not in names

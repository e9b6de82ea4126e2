"""Hundreds of random calls against the definitions: all on a CUDA device, one of each operator interpreted on a CPU.

On a machine with many cores, ``make test-gpu GPU_JOBS=8`` compiles in as many processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from random_calls import LONG, PER_GEOMETRY, SMALL, judge
from random_draw import NAMES, draw
from random_scans import GATES
from run_interpreted import run_interpreted
from scan_cases import poison_empty, without_tf32
from torch import Tensor

from linear_moe import kernels
from linear_moe.kernels import reference

SAMPLE = [
    126, 146, 137, 157, 167, 187, 197, 232, 418, 447, 453, 498, 500, 518, 525, 537, 545, 684, 733, 752, 781,
]  # fmt: skip
"""Every operator, most kinds of decay."""
LONG_CASES = [0, 20, 30, 50, 80, 90, 670]
"""In bfloat16: diagonal decay none, scalar, vector, of values; the delta rule with scalar and vector decay; RWKV7's."""


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LINEAR_MOE_KERNELS", "triton")
    poison_empty(monkeypatch)
    with without_tf32():
        yield


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(len(NAMES)), ids=NAMES)
def test_on_a_device(number: int, fused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from linear_moe.kernels.triton import configs, delta_configs

    if number % 2:  # more segments and pieces than it would cut rows into
        monkeypatch.setattr(configs, "MIN_CHUNKS", 1)
        monkeypatch.setattr(delta_configs, "MIN_CHUNKS", 1)
    call = draw(number)
    assert not judge(call, kernels, "cuda"), call


@pytest.mark.gpu
@pytest.mark.parametrize("number", LONG_CASES, ids=[NAMES[number] for number in LONG_CASES])
def test_16k_tokens_on_a_device(number: int, fused: None) -> None:
    call = draw(number, LONG)
    assert not judge(call, kernels, "cuda"), call


def test_interpreted() -> None:
    """A sample, which proves the numbers as much as the kernels."""
    found = run_interpreted("random_draw.py", *map(str, SAMPLE))
    assert len(found) == len(SAMPLE)
    assert not [row for row in found if row[2]]


def test_a_wrong_kernel_is_found() -> None:
    """One gradient, off by a thousandth, in float32; one state that holds NaN."""

    class Off:
        """The definition, but not quite."""

        @staticmethod
        def delta_rule(q: Tensor, k: Tensor, *others: Any, **options: Any) -> tuple[Tensor, Tensor]:
            o, state = reference.delta_rule(q + 1e-3 * (q - q.detach()), k, *others, **options)
            return o, state if is_finite else state * float("nan")

    call = draw(180, SMALL)
    assert call.op == "delta_rule" and call.dtype == torch.float32
    is_finite = True
    assert list(judge(call, Off, "cpu")) == ["grad q"]
    is_finite = False
    assert {"state out", "grad q"} <= set(judge(call, Off, "cpu"))


def test_numbers_are_calls_of_every_kind() -> None:
    """A number is the same call every time, shares what it is compiled for with its geometry, and nothing else."""
    calls = [draw(number, SMALL) for number in range(len(NAMES))]
    for name, x in draw(345, SMALL).tensors.items():
        assert torch.equal(x.nan_to_num(7.0), calls[345].tensors[name].nan_to_num(7.0))
    for first, other in zip(calls[::PER_GEOMETRY], calls[1::PER_GEOMETRY]):
        assert (first.op, first.dtype, first.layouts) == (other.op, other.dtype, other.layouts)
        assert (first.wide, first.narrow, first.constant) == (other.wide, other.narrow, other.constant)
        if "v" in first.tensors:
            assert first.tensors["v"].shape[2:] == other.tensors["v"].shape[2:]
    words = Counter(word for call in calls for word in call.words)
    assert all(words[f"gates {kind}"] > 10 for kind in GATES) and words["packed"] > 100
    tokens = {call.tensors["v"].shape[1] for call in calls if "v" in call.tensors}
    assert {1, 16, 17, 64, 65} <= tokens
    offsets = [call.tensors["cu_seqlens"] for call in calls if "cu_seqlens" in call.tensors]
    assert any((x.diff() == 0).any() for x in offsets), "empty documents"

"""Fused kernels are tried before their first use; a wrong one is not used, and says so."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from random_calls import PER_GEOMETRY, SMALL, Call, results
from random_draw import NAMES, draw
from scan_cases import Inputs, make
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linear_moe import kernels
from linear_moe.kernels import dispatch
from linear_moe.kernels.triton import trial

Change = Callable[[str, Any], Any]


@contextmanager
def pretended(change: Change = lambda op, results: results) -> Iterator[list[str]]:
    """Every operation has a "fused kernel", torch's with a change of what it returns; the names of those that ran."""
    ran: list[str] = []

    def pretend(op: str, fused: dispatch.Backend, in_torch: dispatch.Backend) -> dispatch.Backend:
        def run(*args: Any, **kwargs: Any) -> Any:
            ran.append(op)
            return change(op, in_torch.run(*args, **kwargs))

        return dataclasses.replace(fused, run=run, obstacle=in_torch.obstacle, begins=in_torch.begins)

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
        patch.setattr(trial, "_passed", {})
        for op, (fused, in_torch, reference) in dispatch.BACKENDS.items():
            patch.setitem(dispatch.BACKENDS, op, (pretend(op, fused, in_torch), in_torch, reference))
        yield ran


def messages(act: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(warning.message) for warning in caught]


def short(op: str, **options: Any) -> Inputs:
    return make(op, **{"decay": "scalar", "num_tokens": 20, "dtype": torch.float32, **options})


def calls() -> Iterator[Call]:
    """One of each geometry of the random calls: every operation, decay, dtype and layout."""
    for number in range(0, len(NAMES), PER_GEOMETRY):
        call = draw(number, SMALL)
        if all(x.numel() for x in call.tensors.values()):
            yield call


def test_right_kernels_pass() -> None:
    for call in calls():
        with pretended() as ran:
            assert not messages(partial(results, kernels, call, call.arguments("cpu"))), call
        assert ran == [call.op] * 2, "the trial, and the call"


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(0, len(NAMES), PER_GEOMETRY), ids=NAMES[::PER_GEOMETRY])
def test_fused_kernels_pass_on_a_device(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So they are what runs by default; every call of random_calls is judged there by the definition, besides."""
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    call = draw(number)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results(kernels, call, call.arguments("cuda"))
    assert dispatch.pick(call.op, torch.device("cuda"), call.dtype).name == "triton"


def test_wrong_results_are_found() -> None:
    """Up to 4 x 4 elements of the first result, which are off by a third of the largest one."""

    def spoil(op: str, found: Any) -> Any:
        if isinstance(found, kernels.Segment):
            return dataclasses.replace(found, state=spoil(op, found.state))
        if isinstance(found, tuple):
            return spoil(op, found[0]), *found[1:]
        off = torch.zeros_like(found)
        (off[..., :4, :4] if off.ndim > 1 else off[:4]).fill_(0.01 + 0.33 * found.detach().abs().max())
        return found + off

    for call in calls():
        with pretended(spoil) as ran:
            (message,) = messages(partial(results, kernels, call, call.arguments("cpu")))
            assert (
                f"fused kernel of {call.op} is not used" in message and "differs from float64 by" in message
            )
            assert not messages(partial(results, kernels, call, call.arguments("cpu"))), "once"
        assert ran == [call.op], "the trial alone"


def test_wrong_gradients_are_found() -> None:
    """Right results, with gradients that are 1.3 times as large, and with NaN."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * factor

    inputs = short("delta_rule")
    for factor in (1.3, float("nan")):
        with pretended(lambda op, found: (Wrong.apply(found[0]), found[1])) as ran:
            assert not messages(lambda: inputs.run(kernels)), f"{factor}, of a gradient that nobody wants"
            (message,) = messages(lambda: inputs.differentiable().run(kernels))
            assert "the gradient of" in message and ran == ["delta_rule"] * 3


def test_each_kind_is_tried_once() -> None:
    """Other widths, dtypes and decays are other kinds, and lengths that may be cut into other pieces."""
    with pretended() as ran:

        def trials(**options: Any) -> int:
            before = len(ran)
            short("diag_decay", **options).run(kernels)
            return len(ran) - before - 1

        assert trials() == 1 and trials() == 0 and trials(num_tokens=31) == 0 and trials(batch=3) == 0
        assert trials(num_tokens=32) == 1 and trials(batch=4) == 1
        assert trials(decay="vector") == 1 and trials(dtype=torch.float16) == 1 and trials(num_keys=8) == 1
    with pretended() as ran:
        for num_rows, width in ((5, 4), (900, 4), (5, 6)):  # an expert's, of which each step has others
            kernels.weighted_swiglu(torch.ones(num_rows, width), torch.ones(num_rows))
        assert len(ran) == 5
    with pretended() as ran:
        for num_rows, width in ((5, 4), (900, 4), (5, 6)):  # heads of a memory's slots
            order = torch.arange(2 * num_rows)
            slots = kernels.spread_rows(torch.ones(num_rows, 3, width), order, order.view(-1, 2))
            kernels.collect_rows(slots, order, order.view(-1, 2), torch.ones(num_rows, 2))
        assert len(ran) == 10
    with pretended() as ran:
        for num_tokens, num_experts in ((5, 4), (900, 4), (5, 6)):
            probs, chosen, *_ = kernels.choose_experts(torch.ones(num_tokens, num_experts), 2)
            kernels.sort_slots(chosen, probs, 2)
        assert len(ran) == 10
    with pretended() as ran:
        for x in (torch.ones(2, 3, 4, 5), torch.ones(3, 2, 4, 5).transpose(0, 1)):  # strides are compiled in
            kernels.gated_rms_norm(x)
        assert len(ran) == 4


@pytest.mark.parametrize("first", [0, 1, 3, 4])
def test_samples_lie_as_the_tensors_at_hand(first: int) -> None:
    """Kernels are compiled for alignments and strides."""
    like = torch.zeros(2, 7, 40)[:, :, first : first + 20].unflatten(-1, (4, 5))
    found = trial._random("q", like, (1, 5, 4, 5), torch.Generator())
    assert found.shape == (1, 5, 4, 5) and found.stride() == like.stride()
    assert found.data_ptr() % 16 == like.data_ptr() % 16


def test_a_trial_runs_what_the_call_will_run() -> None:
    """By Triton's own keys: nothing is compiled for a trial alone, and nothing of the call is left untried."""
    program = Path(__file__).with_name("trial_launches.py")
    run = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(found) == 76 and not [row for row in found if row[1] or row[2]]


def test_the_random_state_stays() -> None:
    inputs = short("diag_decay")
    before = torch.random.get_rng_state()
    with pretended():
        inputs.run(kernels)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_surrounds_a_call_does_not_reach_its_trial() -> None:
    """Checkpointing counts the tensors that are saved; inference mode would forbid gradients; autocast would round."""
    inputs = short("delta_rule")
    leaves = inputs.differentiable()
    with pretended() as ran:
        o, _ = checkpoint(lambda: leaves.run(kernels), use_reentrant=False)
        o.sum().backward()
        assert ran == ["delta_rule"] * 3
    with pretended() as ran, torch.inference_mode():
        inputs.run(kernels)
        assert ran == ["delta_rule"] * 2


def test_a_trial_may_use_what_is_not_deterministic() -> None:
    """Float64's cumulative sums on a GPU, which would fail a right kernel; the call itself may not."""
    allowed = []

    def note(op: str, found: Any) -> Any:
        allowed.append(not torch.are_deterministic_algorithms_enabled())
        return found

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pretended(note):
            short("delta_rule").run(kernels)
        assert allowed == [True, False] and torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("mode", "told"), [(0, []), (2, ["default", 2])])
def test_waiting_is_allowed_to_the_trial_alone(
    mode: int, told: list[int | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody forbids it nothing is set: torch warns of a "prototype feature", and warnings may be errors."""
    set_to: list[int | str] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_to.append)
    with trial._alone(torch.device("cuda")):
        assert set_to == told[:1]
    assert set_to == told


def test_a_memory_on_its_way_is_not_waited_for_by_the_trial() -> None:
    inputs = short("diag_decay")
    waited = []

    def arrive() -> Tensor:
        waited.append(True)
        return inputs.tensors["state"]

    with pretended() as ran:
        inputs.run(kernels, state=arrive)
    assert len(waited) == 1 and len(ran) == 2

    wanted: list[str] = []
    gradients = trial._gradients

    def note(results: Any, call: Any, names: list[str], incoming: Any) -> Any:
        wanted.extend(names)
        return gradients(results, call, names, incoming)

    with pretended(), mock.patch.object(trial, "_gradients", note):
        inputs.differentiable().run(kernels, state=arrive)
    assert "state" in wanted, "which may want one"


def test_an_error_of_the_kernel_is_told() -> None:
    def fail(op: str, found: Any) -> Any:
        raise RuntimeError("out of resource: shared memory, Required: 300000\nand more")

    with pretended(fail):
        (message,) = messages(lambda: short("delta_rule").run(kernels))
    assert (
        "RuntimeError: out of resource: shared memory, Required: 300000 (" in message
        and "and more" not in message
    )


def test_who_asked_for_it_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended() as ran:
        monkeypatch.setitem(os.environ, dispatch.ENVIRONMENT_VARIABLE, "triton")
        short("delta_rule").run(kernels)
        assert ran == ["delta_rule"]

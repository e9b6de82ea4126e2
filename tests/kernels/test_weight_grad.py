"""Experts' weight gradients: torch path and fused kernel (interpreted) against one token after the other."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from gpu_checks import captured, never_waiting
from run_interpreted import errors_of_picked
from torch import Tensor
from triton.runtime import _allocation
from weight_grad_cases import CASES, errors, make

from linear_moe.kernels import dispatch, grouped_weight_grad_, reference, weight_grad
from linear_moe.kernels.gradients import has_fast_weight_grad
from linear_moe.kernels.grouped_linear import grouped_linear
from linear_moe.kernels.triton import trial
from linear_moe.kernels.triton import weight_grad as fused_module
from linear_moe.kernels.triton.weight_grad import launch_options

EXACT, SINGLE = 1e-12, 1e-6


@pytest.fixture(scope="module")
def fused_errors(request: pytest.FixtureRequest) -> Callable[[str], list[float]]:
    return errors_of_picked(request, "weight_grad_cases")


@pytest.mark.parametrize("name", CASES)
def test_torch_path_is_exact(name: str) -> None:
    assert max(errors(name, weight_grad.grouped_weight_grad_, torch.float64)) <= EXACT
    assert max(errors(name, weight_grad.grouped_weight_grad_, torch.bfloat16)) <= SINGLE


@pytest.mark.parametrize("name", CASES)
def test_fused_kernel(name: str, fused_errors: Callable[[str], list[float]]) -> None:
    assert len(fused_errors(name)) == 4 and all(error <= SINGLE for error in fused_errors(name))


def test_tiles_compute_little_beside_the_sum() -> None:
    """Of the models' sizes, and of odd ones."""
    for sizes, tile in {
        (1792, 1024): (128, 256, 3),
        (1024, 896): (256, 128, 4),
        (1408, 1152): (256, 128, 4),
        (8, 8): (128, 256, 3),
        (2816, 2048): (128, 256, 3),
    }.items():
        how = launch_options(*sizes)
        assert (how["BO"], how["BI"], how["num_stages"]) == tile


def arguments(**changes: Any) -> dict[str, Any]:
    return make("even", torch.float32) | {"add": True} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(total=torch.zeros(3, 16, 31)), r"total has shape \[3, 16, 31\]\n  why: total is \[E, O, I\]"),
        (dict(total=torch.zeros(3, 16, 32).double()), r"total is torch.float64\n  why: it is a sum of products"),
        (dict(x=torch.zeros(40, 32).half()), r"x is torch.float16 but dy is torch.float32\n  why: "),
        (dict(x=torch.zeros(39, 32)), r"x has 39 rows, and dy 40\n  why: "),
        (dict(dy=torch.zeros(40)), r"dy has shape \[40\]\n  why: "),
        (dict(dy=torch.zeros(40, 16).int()), r"dy is torch.int32\n  why: "),
        (dict(ends=torch.tensor([8, 16, 24])), r"ends is torch.int64 of shape \[3\] on cpu\n  why: .*\n  try: int32"),
    ],
)  # fmt: skip
def test_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grouped_weight_grad_(**arguments(**changes))


def test_what_the_kernel_covers() -> None:
    takes = dispatch.BACKENDS["grouped_weight_grad_"][0].takes
    half = make("even", torch.bfloat16) | {"add": True}
    assert takes(**half) and not takes(**arguments())
    odd = torch.empty(40 * 16 + 1, dtype=torch.bfloat16)[1:].view(40, 16)
    for changes in (
        dict(total=half["total"].transpose(1, 2).contiguous().transpose(1, 2)),
        dict(dy=half["dy"].t().contiguous().t()),
        dict(dy=odd),
        dict(ends=half["ends"].repeat_interleave(2)[::2]),
        dict(x=torch.zeros(40, 12).bfloat16(), total=torch.zeros(3, 16, 12)),
    ):
        assert not takes(**half | changes), changes


def pretend(monkeypatch: pytest.MonkeyPatch, run: Callable[..., None]) -> None:
    """A fused kernel for the CPU."""
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(trial, "_passed", {})
    fused, in_torch, definition = dispatch.BACKENDS["grouped_weight_grad_"]
    fused = dataclasses.replace(fused, run=run, obstacle=in_torch.obstacle)
    monkeypatch.setitem(dispatch.BACKENDS, "grouped_weight_grad_", (fused, in_torch, definition))


def test_a_right_kernel_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of tokens, which changes in every step; written and added apart."""
    ran: list[tuple[int, bool]] = []

    def right(total: Tensor, dy: Tensor, x: Tensor, ends: Tensor, add: bool) -> None:
        ran.append((len(dy), add))
        weight_grad.grouped_weight_grad_(total, dy, x, ends, add)

    pretend(monkeypatch, right)
    given = make("even", torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for num_tokens in (40, 30):
            few = given | {name: given[name][:num_tokens] for name in ("dy", "x")}
            for add in (False, True):
                grouped_weight_grad_(**few, add=add)
    rows = trial.NUM_TOKENS + 5
    assert ran == [(rows, False), (40, False), (rows, True), (40, True), (30, False), (30, True)]


WRONG: dict[str, Callable[..., dict[str, Any]]] = {
    "adds what is to be written": lambda **given: given | {"add": True},
    "writes what is to be added": lambda **given: given | {"add": False},
    "one token of the next expert": lambda **given: given | {"ends": given["ends"] + 1},
    "of all tokens": lambda **given: given | {"ends": given["ends"].clone().fill_(len(given["dy"]))},
    "nothing of experts without tokens": lambda **given: given
    | {name: given[name][given["ends"].diff(prepend=given["ends"].new_zeros(1)) > 0] for name in ("total", "ends")},
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_not_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(total: Tensor, dy: Tensor, x: Tensor, ends: Tensor, add: bool) -> None:
        changed = WRONG[name](total=total, dy=dy, x=x, ends=ends, add=add)
        weight_grad.grouped_weight_grad_(**changed)
        if changed["total"] is not total:  # a copy
            total[ends.diff(prepend=ends.new_zeros(1)) > 0] = changed["total"]

    pretend(monkeypatch, wrong)
    add = name.startswith(("writes", "one", "of"))
    given = make("some without tokens", torch.bfloat16)
    expected = given["total"].double()
    exact = {n: given[n].double() for n in ("dy", "x")} | {"total": expected, "ends": given["ends"]}
    reference.grouped_weight_grad_(**exact, add=add)
    with pytest.warns(
        UserWarning, match="^the fused kernel of grouped_weight_grad_ is not used: .* the sum differs"
    ):
        grouped_weight_grad_(**given, add=add)
    torch.testing.assert_close(given["total"].double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("capability, picked", [((8, 9), "chunked"), ((9, 0), "triton"), ((12, 0), "triton")])
def test_where_it_runs(capability: tuple[int, int], picked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors of tensors need Hopper's hardware; older GPUs have the other kernels."""
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda")
    assert dispatch.pick("grouped_weight_grad_", device, torch.bfloat16).name == picked
    assert dispatch.pick("weighted_swiglu", device, torch.bfloat16).name == "triton"


def test_is_better_where_a_fused_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU only on Hopper; nobody is told otherwise."""
    given: dict[str, Any] = make("even", torch.bfloat16) | {"add": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not has_fast_weight_grad(**given)
        pretend(monkeypatch, weight_grad.grouped_weight_grad_)
        assert has_fast_weight_grad(**given)
        assert not has_fast_weight_grad(**make("even", torch.float32), add=True)
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "fused", mock.Mock(side_effect=torch.OutOfMemoryError))
            assert not has_fast_weight_grad(**given), "no memory to try it"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
        on_blackwell = mock.Mock(is_cuda=True, device=torch.device("cuda"))
        assert not has_fast_weight_grad(**given | {"total": on_blackwell})
        monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "chunked")
        assert not has_fast_weight_grad(**given)


def test_the_callers_allocator_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors lie in memory of torch, in whichever thread; Triton asks an allocator of the context."""
    seen: list[Tensor] = []

    class Launches:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **how: seen.append(_allocation._allocator.get()(384, 128, None))

    def launch() -> None:
        _allocation._allocator.set(own)
        fused_module.grouped_weight_grad_(**make("even", torch.float16), add=True)
        assert _allocation._allocator.get() is own

    own = mock.Mock(side_effect=AssertionError)
    monkeypatch.setattr(fused_module, "grouped_weight_grad_kernel", Launches())
    before = _allocation._allocator.get()
    with ThreadPoolExecutor(1) as other:
        other.submit(launch).result()
    fused_module.grouped_weight_grad_(**make("even", torch.float16), add=True)
    assert _allocation._allocator.get() is before
    assert len(seen) == 2 and all(x.nbytes == 384 for x in seen)


# ---- on a GPU ----

ON_A_DEVICE = {
    "A0.3B, fc1": (64, 262144, 1792, 1024),
    "A0.3B, fc2": (64, 262144, 1024, 896),
    "parts of tiles": (5, 1000, 136, 264),
}
"""Experts, rows, outputs and inputs."""


def on_a_device(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Uneven experts, one of them without rows, and rows of nobody."""
    num_experts, num_rows, num_outputs, num_inputs = ON_A_DEVICE[name]
    draw = torch.Generator("cuda").manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=draw, device="cuda")  # noqa: E731
    ends = torch.rand(num_experts, generator=draw, device="cuda").sort().values.mul(num_rows).int()
    ends[1] = ends[0]
    dy, x = normal(num_rows, num_outputs).to(dtype), normal(num_rows, num_inputs).to(dtype)
    return {"total": normal(num_experts, num_outputs, num_inputs), "dy": dy, "x": x, "ends": ends}


@contextmanager
def fused_or_fails(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A trial that fails, and what else has torch's product run, is a warning; nobody's choice is left."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a Hopper or later")
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    with warnings.catch_warnings():
        # Not all: torch warns whoever forbids to wait for the device, of a "prototype feature".
        warnings.filterwarnings("error", message=".*grouped_weight_grad_")
        yield


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ON_A_DEVICE)
def test_on_a_device(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes its trial, nobody waits for it, and it has the same bits in every run, thread and graph."""
    given = on_a_device(name, dtype)
    before, rows = given.pop("total"), {n: given[n].float() for n in ("dy", "x")}

    def run(total: Tensor, add: bool) -> Tensor:
        grouped_weight_grad_(total, **given, add=add)
        return total

    is_hopper = torch.cuda.get_device_capability()[0] == 9
    with fused_or_fails(monkeypatch), ThreadPoolExecutor(1) as other:
        for add in (False, True):
            assert has_fast_weight_grad(before, **given, add=add) == is_hopper
            assert dispatch.fused("grouped_weight_grad_", before, **given, add=add) is not None
            true = before.clone()  # each expert's product in float32
            weight_grad.grouped_weight_grad_(true, **rows, ends=given["ends"], add=add)
            found = other.submit(run, before.clone(), add).result()
            # Tensor cores cut sums off, by up to 2^-23 in each of some 300 turns; an H100 has 1.2e-5.
            assert ((found - true).norm() / true.norm()).item() <= 3e-5
            assert (found - true).abs().max() <= 1e-4 * true.abs().max()
            assert add or not found[1].any()
            again, in_a_graph = before.clone(), before.clone()
            with never_waiting():
                run(again, add)
            captured(partial(lambda total, add: [run(total, add)], in_a_graph, add))
            assert torch.equal(found, again) and torch.equal(found, in_a_graph)


@pytest.mark.gpu
def test_in_a_backward_pass_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """In autograd's thread, on a stream that is not the default one."""
    given = on_a_device("parts of tiles", torch.bfloat16)
    given["ends"][-1] = len(given["x"])
    weight = torch.empty_like(given["total"], dtype=torch.bfloat16, requires_grad=True)
    found, expected = given["total"].clone(), given["total"].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with fused_or_fails(monkeypatch), torch.cuda.stream(stream):
        y = grouped_linear(given["x"], weight, given["ends"], lambda *rows: (found, True))
        y.backward(given["dy"])
    torch.cuda.current_stream().wait_stream(stream)
    weight_grad.grouped_weight_grad_(
        expected, given["dy"].float(), given["x"].float(), given["ends"], add=True
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

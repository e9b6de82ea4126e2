"""Experts' weight gradients: torch path and fused kernel (interpreted) against one token after the other."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from run_interpreted import errors_of_picked
from torch import Tensor
from weight_grad_cases import CASES, errors, make

from linear_moe.kernels import dispatch, grouped_weight_grad_, reference, weight_grad
from linear_moe.kernels.triton import trial
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
        (1792, 1024): (128, 256),
        (1024, 896): (256, 128),
        (1408, 1152): (128, 128),
        (8, 8): (128, 128),
        (2816, 2048): (128, 256),
    }.items():
        how = launch_options(*sizes)
        assert (how["BO"], how["BI"]) == tile and how["num_warps"] == (4 if tile == (128, 128) else 8)


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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(64, 16384, 1792, 1024), (64, 16384, 1024, 896), (5, 1000, 136, 264)])
def test_on_a_device(sizes: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes its trial, nobody waits for it, and it has the same bits in every run."""
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    num_experts, num_tokens, num_outputs, num_inputs = sizes
    draw = torch.Generator("cuda").manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=draw, device="cuda")  # noqa: E731
    dy, x = normal(num_tokens, num_outputs).to(dtype), normal(num_tokens, num_inputs).to(dtype)
    ends = torch.rand(num_experts, generator=draw, device="cuda").sort().values.mul(num_tokens).int()
    ends[1] = ends[0]
    before = normal(num_experts, num_outputs, num_inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for add in (False, True):
            found, again, true = before.clone(), before.clone(), before.double()
            grouped_weight_grad_(found, dy, x, ends, add)
            torch.cuda.set_sync_debug_mode("error")
            try:
                grouped_weight_grad_(again, dy, x, ends, add)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            weight_grad.grouped_weight_grad_(true, dy.double(), x.double(), ends, add)
            assert ((found.double() - true).norm() / true.norm()).item() <= 1e-5
            assert torch.equal(found, again) and (add or not found[1].any())

"""From logits to sorted slots: torch path and fused kernels (interpreted) against loops over tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from route_cases import CASES, errors, make, results
from run_interpreted import errors_of_picked

from linear_moe import kernels
from linear_moe.kernels import choose_experts, dispatch, reference, routes, sort_slots

EXACT, SINGLE = 1e-12, 1e-5


@pytest.fixture(scope="module")
def fused_errors(request: pytest.FixtureRequest) -> Callable[[str], list[float]]:
    return errors_of_picked(request, "route_cases")


@pytest.mark.parametrize("name", CASES)
def test_torch_path_is_exact(name: str) -> None:
    assert max(errors(name, routes, torch.float64)) <= EXACT


@pytest.mark.parametrize("name", CASES)
def test_fused_kernels(name: str, fused_errors: Callable[[str], list[float]]) -> None:
    assert len(fused_errors(name)) == 13 and max(fused_errors(name)) <= SINGLE


def test_slots_are_where_they_belong() -> None:
    """Sorted by expert, and of each in the order of tokens; a token's slots in the order of its experts."""
    chosen = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    assert routes.experts_of(chosen, 2).tolist() == [[1, 3], [0, 3], [0, 2], [0, 1]]
    order, place, slots, probs = sort_slots(chosen, torch.arange(16.0).view(4, 4), 2)
    assert order.tolist() == [2, 4, 6, 0, 7, 5, 1, 3] and slots.tolist() == [3, 2, 1, 2]
    assert place.flatten()[order].tolist() == [*range(8)]
    assert probs.tolist() == [4, 8, 12, 1, 13, 10, 3, 7]


@pytest.mark.parametrize("num_experts", [127, 128, 1000])
def test_keys_have_room_for_every_expert(num_experts: int) -> None:
    best = (
        torch.rand(20, num_experts, generator=torch.Generator().manual_seed(1)).topk(5).indices.sort().values
    )
    found = routes.experts_of(torch.zeros(20, num_experts, dtype=torch.bool).scatter(1, best, True), 5)
    assert found.dtype == torch.int64 and torch.equal(found, best)


@pytest.mark.parametrize(
    ("function", "change", "message"),
    [
        ("choose_experts", dict(x=torch.zeros(3)), r"x has shape \[3\]"),
        ("choose_experts", dict(x=torch.zeros(3, 4, dtype=torch.int64)), "x is torch.int64"),
        ("choose_experts", dict(per_token=5), "per_token is 5"),
        ("choose_experts", dict(per_token=0), "per_token is 0"),
        ("choose_experts", dict(is_token=torch.ones(3)), "is_token is torch.float32"),
        ("choose_experts", dict(is_token=torch.ones(4, dtype=torch.bool)), r"is_token has shape \[4\]"),
        ("sort_slots", dict(chosen=torch.zeros(3, 4)), "chosen is torch.float32"),
        ("sort_slots", dict(probs=torch.zeros(3, 5)), r"probs has shape \[3, 5\]"),
        ("sort_slots", dict(probs=torch.zeros(3, 4, device="meta")), "probs is on meta"),
        ("sort_slots", dict(per_token=5), "per_token is 5"),
    ],
)
def test_refuses_what_does_not_fit(function: str, change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = dict(per_token=2)
    if function == "choose_experts":
        given["x"] = torch.zeros(3, 4)
    else:
        given |= dict(chosen=torch.zeros(3, 4, dtype=torch.bool), probs=torch.zeros(3, 4))
    with pytest.raises(ValueError, match=message):
        getattr(kernels, function)(**(given | change))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_fused_kernels_on_a_gpu(name: str) -> None:
    given, options = make(name, torch.float32)
    exact = {n: x.double() if x.is_floating_point() else x for n, x in given.items()}
    truth = results(reference, exact, options)
    there, moved = (
        {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in d.items()} for d in (given, options)
    )
    fits = CASES[name]["experts"] <= 1024
    assert (dispatch.pick("choose_experts", there["x"].device, torch.float32).name == "triton") and (
        not fits or dispatch.fused("choose_experts", there["x"], **moved) is not None
    )
    for found, true in zip(results(kernels, there, moved), truth, strict=True):
        torch.testing.assert_close(found.double().cpu(), true.double(), rtol=2e-5, atol=2e-5)
    again = [results(kernels, there, moved) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*again, strict=True)), "same bits in every run"


@pytest.mark.gpu
def test_routes_many_tokens_as_torch_does() -> None:
    x = torch.randn(40001, 64, device="cuda")
    probs, chosen, scores, counts = choose_experts(x, 8)
    expected = routes.choose_experts(x, 8)
    for found, true in zip((probs, chosen, scores, counts), expected, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-6)
    for found, true in zip(sort_slots(chosen, probs, 8), routes.sort_slots(chosen, probs, 8), strict=True):
        assert torch.equal(found, true.to(found.dtype))

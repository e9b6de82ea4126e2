"""Cases of routing; run_interpreted.py runs the fused kernels in Triton's interpreter."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from scan_cases import error
from torch import Tensor

from linear_moe.kernels import reference

CASES: dict[str, dict[str, Any]] = {
    "64 experts, several programs": dict(tokens=70, experts=64, per_token=8),
    "odd numbers": dict(tokens=37, experts=5, per_token=2, factor=2.5),
    "among the chosen": dict(tokens=40, experts=12, per_token=3, among_chosen=True, factor=0.5),
    "padding": dict(tokens=35, experts=8, per_token=2, is_padded=True),
    "padding, among the chosen": dict(tokens=35, experts=8, per_token=2, is_padded=True, among_chosen=True),
    "every expert": dict(tokens=6, experts=4, per_token=4),
    "one expert each": dict(tokens=33, experts=100, per_token=1),
    "more experts than a program has pairs": dict(tokens=3, experts=2100, per_token=2),
    "one token": dict(tokens=1, experts=3, per_token=2),
    "far from zero": dict(tokens=9, experts=6, per_token=2, shift=80.0),
}


def make(name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Logits, marks and incoming gradients; options. Some tokens chose too few experts, one too many."""
    case = dict(CASES[name])
    draw = torch.Generator().manual_seed(len(name))
    tokens, experts, per_token = (case.pop(key) for key in ("tokens", "experts", "per_token"))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).float().to(dtype)

    given = dict(
        x=normal(tokens, experts) + case.pop("shift", 0.0),
        probs=normal(tokens, experts),
        up=normal(tokens, experts),
        up_sum=normal(experts),
        up_sorted=normal(tokens * per_token),
    )
    if case.pop("is_padded", False):
        case["is_token"] = torch.rand(tokens, generator=draw) < 0.6
    chosen = torch.zeros(tokens, experts, dtype=torch.bool)
    chosen.scatter_(1, normal(tokens, experts).topk(per_token).indices, True)
    if tokens > 2:
        chosen[0], chosen[1], chosen[2, 1:] = False, True, False
    return given | dict(chosen=chosen), case | dict(per_token=per_token)


def errors(name: str, module: ModuleType, dtype: torch.dtype) -> list[float]:
    """Of every result and gradient, against loops over tokens in float64."""
    given, options = make(name, dtype)
    exact = {n: x.double() if x.is_floating_point() else x for n, x in given.items()}
    return [
        error(found.double(), truth.double())
        for found, truth in zip(
            results(module, given, options), results(reference, exact, options), strict=True
        )
    ]


def results(module: Any, given: dict[str, Tensor], options: dict[str, Any]) -> list[Tensor]:
    """Gradients of both differentiable results of the choice, together and each alone, and of the sorted slots."""
    leaves = {n: given[n].detach().requires_grad_() for n in ("x", "probs")}
    probs, chosen, scores, counts = module.choose_experts(leaves["x"], **options)
    of_probs, of_sum = (probs * given["up"]).sum(), (scores * given["up_sum"]).sum()
    grads = [
        torch.autograd.grad(y, leaves["x"], retain_graph=True)[0]
        for y in (of_probs, of_sum, of_probs + of_sum)
    ]
    order, place, slots, sorted_probs = module.sort_slots(
        given["chosen"], leaves["probs"], options["per_token"]
    )
    (grad,) = torch.autograd.grad((sorted_probs * given["up_sorted"]).sum(), leaves["probs"])
    found = [probs, chosen, scores, counts, *grads, order, place, slots, sorted_probs, grad]
    return [y.detach() for y in found]


def fused(name: str) -> list[float]:
    from linear_moe.kernels.triton import routes

    return [*errors(name, routes, torch.float32), lost(name, routes)]  # type: ignore[arg-type]


def lost(name: str, module: Any) -> float:
    """1 where a logit that is no number, or minus infinity in all of a row, leaves no trace in its token's row."""
    given, options = make(name, torch.float32)
    x = given["x"]
    x[0, -1], x[-1] = float("nan"), float("-inf")
    probs = module.choose_experts(x, **options)[0]
    others = probs[1:-1]
    return 1.0 - float(probs[0].isnan().all() and probs[-1].isnan().all() and not others.isnan().any())

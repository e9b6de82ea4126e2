"""The loss that balances the memories of a mixture: its definition in a training run, and the same in every layout.

Letters: B rows, T tokens, D hidden, E memories, k memories per token.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.parity import GRADIENT, LAYOUTS, Comparison
from tests.training.tiny import ARGUMENTS, EXPERTS, metrics, train

KINDS = ["gla", "mom_gated_deltanet", "softmax", "mom_gla"]
LAST = len(KINDS) - 1
COEFFICIENTS = tuple(f"--mom-{inner}-aux-loss-coeff" for inner in ("gla", "gated-deltanet"))


def balance(hidden_BTD: Tensor, router_ED: Tensor, num_chosen: int) -> Tensor:
    """E times the sum over memories of the share of choices times the mean probability, token by token."""
    probs = [(router_ED @ x_D).softmax(0) for row in hidden_BTD for x_D in row]
    chosen = [p_E.argsort(descending=True)[:num_chosen].tolist() for p_E in probs]
    total = hidden_BTD.new_zeros(())
    for e in range(len(router_ED)):
        share = sum(e in choice for choice in chosen) / (len(chosen) * num_chosen)
        total = total + len(router_ED) * share * sum(p_E[e] for p_E in probs) / len(probs)
    return total


def routed(rank: int, world: int, argv: list[str]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """One step in float64: what the last layer's router saw in each micro-batch, and its weight afterwards."""
    from linear_moe.lsm.mom import MixtureOfMemories

    seen: list[tuple[Tensor, Tensor]] = []
    route = MixtureOfMemories.route

    def recorded(self: Any, hidden_BTD: Tensor, w: dict[str, Tensor]) -> Any:
        seen.append((hidden_BTD.detach().clone(), w["router"].detach().clone()))
        return route(self, hidden_BTD, w)

    MixtureOfMemories.route = recorded
    try:
        after = train(rank, world, argv, observe=True, exact=True)["after"]
    finally:
        MixtureOfMemories.route = route
    name = f"decoder.layers.{LAST}.self_attention.router"
    return seen[1::2], next(data for key, _, _, data in after if key == name)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_the_router_learns_the_balance_of_its_definition(gloo, tmp_path, moe):
    """The last layer's loss touches nothing else that its router's gradient depends on: the difference is its own."""
    weights = {}
    for coefficient in (0.0, 0.5):
        argv = [*ARGUMENTS, *(EXPERTS if moe else []), "--layer-kinds", ",".join(KINDS), *GRADIENT]
        argv += [x for flag in COEFFICIENTS for x in (flag, str(coefficient))]
        (found,) = gloo(1, routed, [*argv, "--run-dir", str(tmp_path / str(coefficient))])
        seen, weights[coefficient] = found
    assert len(seen) == 4, "one per micro-batch"
    router_ED = seen[0][1].double().requires_grad_()
    balances = [balance(hidden_BTD.double(), router_ED, 2) for hidden_BTD, _ in seen]
    mean = sum(balances) / len(balances)
    (expected,) = torch.autograd.grad(0.5 * mean, router_ED)
    (step,) = metrics(tmp_path / "0.5")
    assert step["memory_layers"] == [1, LAST]
    assert step["memory_balance"][1] == pytest.approx(mean.item(), rel=1e-6)
    assert sum(step["memory_load"][1]) == pytest.approx(1, rel=1e-6)
    # Adam's step, undone
    moved = {c: (router_ED.detach() - weight) / 1000 for c, weight in weights.items()}
    gradient = {c: x / (1 - x.abs()) for c, x in moved.items()}
    error = (gradient[0.5] - gradient[0.0] - expected).norm() / expected.norm()
    assert error < 1e-4, error


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, _pool: Any) -> Comparison:
    """Without experts Megatron would not scale auxiliary losses; large, so that they are most of the gradient."""
    large = tuple(x for flag in COEFFICIENTS for x in (flag, "1.0"))
    return Comparison(_pool, tmp_path_factory.mktemp("dense"), KINDS, False, extra=large, rows=1)


@pytest.mark.parametrize("layout", ["dp2", "dp4", "cp2", "pp2", "tp2-sp", "tp2-no-sp"])
def test_layouts_without_experts(dense, layout):
    """Also whatever the number of micro-batches per rank: four, two or one."""
    dense.check(*LAYOUTS[layout], layout)

"""Group-limited routing against DeepSeek-V2's own words (arXiv:2405.04434): choice, weights, balance of a sequence."""

import pytest
import torch
from torch import Tensor

from tests.regression.whole_models import build

EXPERTS, GROUPS, OPEN, TOPK, SCALE, BALANCE = 16, 8, 3, 6, 16.0, 0.01
FLAGS = [
    *("--num-experts", str(EXPERTS), "--moe-router-topk", str(TOPK), "--moe-router-num-groups", str(GROUPS)),
    *("--moe-router-group-topk", str(OPEN), "--moe-router-topk-scaling-factor", str(SCALE)),
    *("--moe-router-load-balancing-type", "seq_aux_loss", "--moe-aux-loss-coeff", str(BALANCE)),
]


def routed(rank: int, world: int) -> list[Tensor]:
    """Choices, weights and the router's gradient of the balancing loss alone: by Megatron's router with our groups."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    router = build(["gla"], *FLAGS, moe=True, train=True, dtype=torch.float32).decoder.layers[0].mlp.router
    x_TBD = torch.randn(40, 3, 64)
    probs, chosen = router(x_TBD)
    (probs.sum() * 0.0).backward()
    return [x_TBD, router.weight.detach(), probs.detach(), chosen, router.weight.grad]


def test_choice_weights_and_balance(gloo):
    (seen,) = gloo(1, routed)
    x_TBD, weight, probs, chosen, gradient = seen
    weight = weight.clone().requires_grad_()
    scores_TBE = (x_TBD @ weight.T).softmax(-1)
    T, B, _ = x_TBD.shape
    loss = torch.zeros(())
    for b in range(B):
        selected_TE = torch.zeros(T, EXPERTS)
        for t in range(T):
            s = scores_TBE[t, b]
            best = s.view(GROUPS, -1).max(-1).values.topk(OPEN).indices.tolist()
            allowed = [e for e in range(EXPERTS) if e // (EXPERTS // GROUPS) in best]
            mine = sorted(allowed, key=lambda e, s=s: -s[e].item())[:TOPK]
            row = t * B + b
            assert sorted(chosen[row].nonzero()[:, 0].tolist()) == sorted(mine)
            torch.testing.assert_close(probs[row, mine], SCALE * s[mine].detach(), rtol=1e-5, atol=1e-7)
            selected_TE[t, mine] = 1
        fraction_E = selected_TE.sum(0) * EXPERTS / (TOPK * T)
        loss = loss + BALANCE * (fraction_E * scores_TBE[:, b].mean(0)).sum() / B
    loss.backward()
    torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-8)


def refusal(rank: int, world: int, flags: list[str]) -> str:
    try:
        build(["gla"], *FLAGS, *flags, moe=True)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--moe-router-group-topk", "2"], "2 groups of 2 experts cannot give a token 6 experts"),
        (
            ["--moe-enable-routing-replay"],
            "--moe-enable-routing-replay does not go with group-limited routing",
        ),
    ],
)
def test_what_cannot_be_is_refused(gloo, flags, what):
    (said,) = gloo(1, refusal, flags)
    assert said.startswith(what) and "\n  why: " in said and "\n  try: " in said

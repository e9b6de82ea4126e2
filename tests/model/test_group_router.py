"""Group-limited routing against DeepSeek-V2's own words (arXiv:2405.04434): choice, weights, balance of a sequence."""

import pytest
import torch
from torch import Tensor

from tests.regression.whole_models import build

EXPERTS, GROUPS, OPEN, TOPK, SCALE, BALANCE = 16, 8, 3, 6, 16.0, 0.01
FLAGS = [
    *("--num-experts", str(EXPERTS), "--moe-router-topk", str(TOPK), "--moe-router-num-groups", str(GROUPS)),
    *("--moe-router-group-topk", str(OPEN), "--moe-router-topk-scaling-factor", str(SCALE)),
    *("--moe-aux-loss-coeff", str(BALANCE), "--moe-router-load-balancing-type"),
]
SEQUENCE = "seq_aux_loss"


def routed(rank: int, world: int, balance: str, padding_TB: Tensor | None) -> list[Tensor]:
    """Choices, weights and the router's gradient of the balancing loss alone: by Megatron's router with our groups."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    router = (
        build(["gla"], *FLAGS, balance, moe=True, train=True, dtype=torch.float32)
        .decoder.layers[0]
        .mlp.router
    )
    x_TBD = torch.randn(40, 3, 64)
    probs, chosen = router(x_TBD, padding_TB)
    (probs.sum() * 0.0).backward()
    return [x_TBD, router.weight.detach(), probs.detach(), chosen, router.weight.grad]


@pytest.mark.parametrize(
    ("balance", "is_padded"),
    [(SEQUENCE, False), ("aux_loss", False), ("aux_loss", True), ("global_aux_loss", True)],
)
def test_choice_weights_and_balance(gloo, balance, is_padded):
    """The balance is that of every sequence, or of all tokens at once that are no padding."""
    padding_TB = torch.arange(40)[:, None] >= torch.tensor([40, 31, 7]) if is_padded else None
    (seen,) = gloo(1, routed, balance, padding_TB)
    x_TBD, weight, probs, chosen, gradient = seen
    weight = weight.clone().requires_grad_()
    scores_TBE = (x_TBD @ weight.T).softmax(-1)
    T, B, _ = x_TBD.shape
    counted_TB = torch.ones(T, B, dtype=torch.bool) if padding_TB is None else ~padding_TB
    selected_TBE = torch.zeros(T, B, EXPERTS)
    for b in range(B):
        for t in range(T):
            s = scores_TBE[t, b]
            best = s.view(GROUPS, -1).max(-1).values.topk(OPEN).indices.tolist()
            allowed = [e for e in range(EXPERTS) if e // (EXPERTS // GROUPS) in best]
            mine = sorted(allowed, key=lambda e, s=s: -s[e].item())[:TOPK]
            row = t * B + b
            assert sorted(chosen[row].nonzero()[:, 0].tolist()) == sorted(mine)
            torch.testing.assert_close(probs[row, mine], SCALE * s[mine].detach(), rtol=1e-5, atol=1e-7)
            selected_TBE[t, b, mine] = 1
    parts = range(B) if balance == SEQUENCE else [slice(None)]
    for part in parts:
        counted = counted_TB[:, part]
        fraction_E = selected_TBE[:, part][counted].mean(0) * EXPERTS / TOPK
        loss = BALANCE * (fraction_E * scores_TBE[:, part][counted].mean(0)).sum() / len(parts)
        loss.backward(retain_graph=True)
    torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-8)


def refusal(rank: int, world: int, flags: list[str]) -> str:
    try:
        build(["gla"], *FLAGS, SEQUENCE, *flags, moe=True)
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

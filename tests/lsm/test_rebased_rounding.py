"""How exactly ReBased reads where its weights add up to little: the bound that its file states."""

import torch
import torch.nn.functional as F

from linear_moe import lsm
from linear_moe.lsm import Placement

ROWS, TOKENS, WIDTH = 4096, 8, 16


def error_and_bound(eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Both ``[rows, tokens]``, in units of the largest value; against the squares themselves in float64."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, ROWS, TOKENS, 1, WIDTH).unbind()
    kind = lsm.get("rebased")
    config = kind.Config(
        hidden_size=WIDTH,
        num_heads=1,
        head_dim=WIDTH,
        layers_of_kind=1,
        eps=eps,
        use_gamma=False,
        use_beta=False,
    )
    mixer = kind(config)
    place = Placement(num_heads=1, layer=0, num_layers=1, layer_of_kind=0)
    o, _ = mixer.scan(state=None, cu_seqlens=None, **mixer.gates({"q": q, "k": k, "v": v}, {}, place))
    q, k, v = (x.squeeze(2).double() for x in (q, k, v))
    q, k = (F.layer_norm(x, (WIDTH,)) for x in (q, k))
    weights = ((q @ k.mT) ** 2 / WIDTH).tril()
    sums = weights.sum(-1, keepdim=True) + eps
    error = (o.squeeze(2) - weights @ v / sums).abs().amax(-1) / v.abs().amax((1, 2))[:, None]
    lengths = ((q**2).sum(-1, keepdim=True) * (k**2).sum(-1)[:, None] / WIDTH).tril().sum(-1)
    return error, torch.finfo(torch.float32).eps * lengths / sums.squeeze(-1)


def test_the_loss_is_that_of_features_that_cancel():
    """Within the bound; percents for few first tokens, nothing behind the fourth."""
    error, bound = error_and_bound(eps=1e-5)
    assert (error <= bound).all(), (error / bound).max()
    assert 1e-3 < error[:, 0].max() < 0.1
    assert (error[:, 0] > 1e-3).float().mean() < 1 / 300
    assert error[:, 4:].max() < 1e-4


def test_a_larger_eps_is_exact():
    error, _ = error_and_bound(eps=1e-2)
    assert error.max() < 1e-4

"""Mixers with a norm and a gate of their own: each against its definition, all heads of one token at a time."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from linear_moe import lsm
from linear_moe.lsm import Mixer, MixerState, split
from tests.contract.cases import EVERY_CASE, assert_close, gradients, make, mixer_class

Definition = Callable[..., Tensor]


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def gated(cfg, p: dict[str, Tensor]) -> Tensor | float:
    """What the output is multiplied with."""
    if cfg.output_gate == "none":
        return 1.0
    return silu(p["g"]) if cfg.output_gate == "swish" else torch.sigmoid(p["g"])


def normed(cfg, y: Tensor, w, num_groups: int) -> Tensor:
    """Root mean square 1 over consecutive channels of all heads, times a weight per channel."""
    if cfg.output_norm == "identity":
        return y
    groups = y.flatten().chunk(num_groups)
    flat = torch.cat([x / (x.square().mean() + cfg.norm_eps).sqrt() for x in groups])
    return flat.view_as(y) * w["norm_weight"]


def mamba2(cfg, o: Tensor, p: dict[str, Tensor], w) -> Tensor:
    """arXiv:2405.21060, section 7.1: the skip D x, the gate, then the norm of each group."""
    x = p["x"] if cfg.conv_size else silu(p["x"])
    y = torch.stack([o[h] + w["D"][h] * x[h] for h in range(cfg.num_heads)])
    return normed(cfg, y * gated(cfg, p), w, cfg.num_groups)


def gsa(cfg, o: Tensor, p: dict[str, Tensor], w) -> Tensor:
    """arXiv:2409.07146, section 3.3: Swish, then the norm."""
    return normed(cfg, silu(o), w, 1) * gated(cfg, p)


def rwkv7(cfg, o: Tensor, p: dict[str, Tensor], w) -> Tensor:
    """arXiv:2503.14456, section 4.3: a norm per head, the bonus of the token's own value, the gate."""
    y = o - o.mean(-1, keepdim=True) if cfg.output_norm == "groupnorm" else o
    if cfg.output_norm != "identity":
        variance = y.square().mean(-1, keepdim=True)
        y = y / (variance + cfg.head_dim * cfg.norm_eps).sqrt() * w["norm_weight"]
    y = y + w["norm_bias"] if cfg.output_norm == "groupnorm" else y
    k = p["k"] * (1 - w["k_a"]) + p["k"] * torch.sigmoid(p["a"]) * w["k_a"]
    v, share = p["v"], torch.sigmoid(p["mix"]) if "mix" in p else 0
    v = v * (1 - share) + share * p["first_v"] if "first_v" in p else v
    y = torch.stack([y[h] + (p["q"][h] * w["r_k"][h]) @ k[h] * v[h] for h in range(cfg.num_heads)])
    return y * p["g"] if cfg.output_gate != "none" else y


def gated_deltanet(cfg, o: Tensor, p: dict[str, Tensor], w) -> Tensor:
    """arXiv:2412.06464, section 3.4: a norm and a gate per head; of several memories, for each of them."""
    y = o.unflatten(1, (cfg.values_per_key, -1))
    if cfg.output_norm != "identity":
        y = y - y.mean(-1, keepdim=True) if cfg.output_norm == "groupnorm" else y
        y = y / (y.square().mean(-1, keepdim=True) + cfg.norm_eps).sqrt()
        weight = w["norm_weight"]
        y = y * (weight.unsqueeze(1) if weight.ndim == 2 else weight)
    y = y + w["norm_bias"].unsqueeze(1) if cfg.output_norm == "groupnorm" else y
    return y.flatten(1) * gated(cfg, p)


DEFINITIONS: dict[str, Definition] = {
    "gated_deltanet": gated_deltanet,
    "mamba2": mamba2,
    "gsa": gsa,
    "rwkv7": rwkv7,
}


def overrides(name: str) -> bool:
    """A mixture of memories reads out as its inner mixer does, of a sum that is defined elsewhere."""
    return mixer_class(name).read_out is not Mixer.read_out and not name.startswith("mom")


@pytest.mark.parametrize("name", [n for n in lsm.names() if overrides(n)])
def test_every_read_out_of_its_own_has_its_definition(name):
    assert name in DEFINITIONS


@pytest.mark.parametrize("name, case", [pair for pair in EVERY_CASE if pair[0] in DEFINITIONS])
def test_read_out(name, case):
    """And its gradients; the convolved projections as they reach it."""
    inputs = make(name, case, tokens=3)
    cfg, w = inputs.mixer.cfg, inputs.w
    o = torch.randn(2, 3, cfg.num_heads, cfg.head_v_dim, dtype=torch.float64, requires_grad=True)
    p, _ = split.split(inputs.mixer, inputs.x, inputs.others, w, inputs.place, MixerState(()), None)
    found = inputs.mixer.read_out(o, p, w, inputs.place)
    truth = torch.zeros_like(o)
    for b in range(2):
        for t in range(3):
            own = {key: x[b, t] for key, x in p.items()}
            truth[b, t] = DEFINITIONS[name](cfg, o[b, t], own, w)
    leaves = {"o": o} | inputs.tensors()
    found, truth = {"read": found}, {"read": truth}
    assert_close(found | gradients(found, leaves), truth | gradients(truth, leaves))

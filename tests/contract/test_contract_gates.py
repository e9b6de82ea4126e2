"""The published formulas of each mixer, from its projections to its outputs, one head and one token at a time.

The other tests share ``gates`` with what they measure; these do not. A new mixer of the package adds its formulas.
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from linear_moe import lsm
from tests.contract.cases import EVERY_CASE, assert_close, make, mixer_class, options

Definition = Callable[..., tuple[Tensor, Tensor]]


def linear_attention(cfg, p: dict[str, Tensor], w, head: int, tokens: int) -> tuple[Tensor, Tensor]:
    """arXiv:2006.16236, equations 16 to 20, without the division by default."""
    phi = {
        "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
        "identity": lambda x: x,
        "relu": lambda x: x.clamp(min=0),
        "swish": lambda x: x / (1 + (-x).exp()),
    }[cfg.feature_map]
    S, z, outputs = torch.zeros(cfg.head_k_dim, cfg.head_v_dim).double(), 0, []
    for t in range(tokens):
        q, k, v = phi(p["q"][t]), phi(p["k"][t]), p["v"][t]
        S, z = S + torch.outer(k, v), z + k
        read, weight = q @ S / math.sqrt(cfg.head_k_dim), q @ z / math.sqrt(cfg.head_k_dim)
        outputs.append(read / (weight + 1e-6) if cfg.normalize else read)
    return torch.stack(outputs), torch.cat([S, z[:, None]], 1) if cfg.normalize else S


def gla(cfg, p: dict[str, Tensor], w, head: int, tokens: int) -> tuple[Tensor, Tensor]:
    """arXiv:2312.06635, section 4: alpha = sigmoid(W2 W1 x + b) ** (1 / 16)."""
    S, outputs = torch.zeros(cfg.head_k_dim, cfg.head_v_dim).double(), []
    for t in range(tokens):
        alpha = torch.sigmoid(p["a"][t]) ** (1 / cfg.gate_logit_normalizer)
        if cfg.gate_clamp_min is not None:
            alpha = alpha.clamp(min=math.exp(cfg.gate_clamp_min))
        S = alpha[:, None] * S + torch.outer(p["k"][t], p["v"][t])
        outputs.append(p["q"][t] @ S / math.sqrt(cfg.head_k_dim))
    return torch.stack(outputs), S


def gated_deltanet(cfg, p: dict[str, Tensor], w, head: int, tokens: int) -> tuple[Tensor, Tensor]:
    """arXiv:2412.06464, equation 10; SiLU on q, k, v with and without the convolution (section 3.4)."""
    S, outputs = torch.zeros(cfg.head_k_dim, cfg.head_v_dim).double(), []
    silu = (lambda x: x) if cfg.conv_size else (lambda x: x * torch.sigmoid(x))
    for t in range(tokens):
        q, k, v = silu(p["q"][t]), silu(p["k"][t]), silu(p["v"][t])
        q, k = q / (q.norm() ** 2 + 1e-6).sqrt(), k / (k.norm() ** 2 + 1e-6).sqrt()
        step = torch.log1p((p["a"][t] + w["dt_bias"][head]).exp())
        alpha = torch.exp(-w["A_log"][head].exp() * step)
        beta = torch.sigmoid(p["b"][t]) * (2 if cfg.allow_neg_eigval else 1)
        S = alpha * (torch.eye(len(k)) - beta * torch.outer(k, k)) @ S + beta * torch.outer(k, v)
        outputs.append(q @ S / math.sqrt(cfg.head_k_dim))
    return torch.stack(outputs), S


DEFINITIONS: dict[str, Definition] = {
    "linear_attention": linear_attention,
    "gla": gla,
    "gated_deltanet": gated_deltanet,
}


def test_every_mixer_of_the_package_has_its_formulas():
    package = {name for name in lsm.names() if mixer_class(name).__module__.startswith("linear_moe.")}
    assert package == set(DEFINITIONS)


@pytest.mark.parametrize("name, case", [pair for pair in EVERY_CASE if pair[0] in DEFINITIONS])
def test_formulas(name, case):
    """Outputs before the output norm and the final memory; the convolution is measured elsewhere, its SiLU is not."""
    inputs = make(name, options(name)[case] | {"output_norm": "identity", "output_gate": "none"}, tokens=6)
    mixer = inputs.mixer
    o, state = inputs.mix()
    p, _ = mixer._split(inputs.x, inputs.w, None, None)
    p |= inputs.low_rank
    truth_o, truth_memory = torch.zeros_like(o), torch.zeros_like(state.memory[0])
    for b, h in itertools.product(range(2), range(mixer.cfg.num_heads)):
        own = {key: x[b, :, h] for key, x in p.items()}
        truth_o[b, :, h], truth_memory[b, h] = DEFINITIONS[name](mixer.cfg, own, inputs.w, h, 6)
    assert_close({"o": o, "memory": state.memory[0]}, {"o": truth_o, "memory": truth_memory})

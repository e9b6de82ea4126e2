"""The published formulas of each mixer, from its projections to its outputs, one head and one token at a time.

The other tests share ``gates`` with what they measure; these do not. A new mixer of the package adds its formulas.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from linear_moe import lsm
from linear_moe.lsm import MixerState, split
from tests.contract.cases import EVERY_CASE, PLACE, assert_close, gradients, make, mixer_class, options

Definition = Callable[..., tuple[Tensor, ...]]


def plain(cfg, x: Tensor) -> Tensor:
    """phi without weights."""
    return {
        "identity": lambda: x,
        "elu": lambda: torch.where(x > 0, x + 1, x.exp()),
        "relu": lambda: x.clamp(min=0),
        "swish": lambda: x / (1 + (-x).exp()),
    }[cfg.feature_map]()


def silu(cfg, x: Tensor) -> Tensor:
    """SiLU where the convolution has not applied it."""
    return x if cfg.conv_size else x * torch.sigmoid(x)


def normed(x: Tensor) -> Tensor:
    """Of unit length; 1e-6 as in the common library."""
    return x / (x.norm() ** 2 + 1e-6).sqrt()


def mapped(cfg, x: Tensor, w, side: str) -> Tensor:
    """phi of one query or key; learned maps from their papers, sizes and biases as in the common library."""
    learned = "feature_map_" if cfg.tie_feature_map_qk else f"feature_map_{side}_"
    W = {key.removeprefix(learned): value for key, value in w.items() if key.startswith(learned)}
    match cfg.feature_map:
        case "hedgehog":
            y = torch.stack([2 * (row @ x + bias) for row, bias in zip(W["weight"], W["bias"], strict=True)])
            return torch.cat([y.exp(), (-y).exp()]) / (y.exp() + (-y).exp()).sum()
        case "t2r":
            return (W["weight"] @ x).clamp(min=0)
        case "elementwise_product":
            return (W["weight1"] @ x + W["bias1"]) * (W["weight2"] @ x + W["bias2"])
        case "dpfp":
            y = [*x.clamp(min=0), *(-x).clamp(min=0)]
            return torch.stack([y[i] * y[i - j] for j in (1, 2, 3, 4) for i in range(len(y))])
    return plain(cfg, x)


def linear_attention(cfg, p: dict[str, Tensor], w, head: int, tokens: int) -> tuple[Tensor, Tensor]:
    """arXiv:2006.16236, equations 16 to 20, without the division by default."""
    S, z, outputs = 0, 0, []
    for t in range(tokens):
        q, k, v = mapped(cfg, p["q"][t], w, "q"), mapped(cfg, p["k"][t], w, "k"), p["v"][t]
        q, k = q / (q.sum() + 1e-4 if cfg.norm_q else 1), k / (k.sum() + 1e-4 if cfg.norm_k else 1)
        S, z = S + torch.outer(k, v), z + k
        read, weight = q @ S / math.sqrt(len(k)), q @ z / math.sqrt(len(k))
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


def gated_deltanet(cfg, p: dict[str, Tensor], w, head: int, tokens: int) -> tuple[Tensor, ...]:
    """arXiv:2412.06464, equation 10; SiLU on q, k, v with and without the convolution (section 3.4)."""
    count, width = cfg.values_per_key, cfg.head_v_dim // cfg.values_per_key
    rate, bias = (w[name].view(-1, count)[head] for name in ("A_log", "dt_bias"))
    memories, outputs = [torch.zeros(cfg.head_k_dim, width).double() for _ in range(count)], []
    for t in range(tokens):
        q, k, v = normed(silu(cfg, p["q"][t])), normed(silu(cfg, p["k"][t])), silu(cfg, p["v"][t])
        for r, S in enumerate(memories):
            step = torch.log1p((p["a"][t][r] + bias[r]).exp())
            alpha = torch.exp(-rate[r].exp() * step)
            beta = torch.sigmoid(p["b"][t][r]) * (2 if cfg.allow_neg_eigval else 1)
            written = beta * torch.outer(k, v[r * width : (r + 1) * width])
            memories[r] = alpha * (torch.eye(len(k)) - beta * torch.outer(k, k)) @ S + written
        outputs.append(torch.cat([q @ S / math.sqrt(cfg.head_k_dim) for S in memories]))
    return torch.stack(outputs), *memories


def lightning_attention(cfg, p: dict[str, Tensor], w, head: int, tokens: int) -> tuple[Tensor, Tensor]:
    """arXiv:2405.17381, section 3; the slopes of arXiv:2307.14995, equation 5, and arXiv:2501.08313."""
    H, layer, layers = cfg.num_heads, PLACE.layer, PLACE.num_layers
    rate = 8 * head / H * (1 - layer / layers)
    if cfg.slopes == "alibi":
        rate = (2 ** (-8 / H)) ** (head + 1) * (1 - layer / (layers - 1 + 1e-5) + 1e-5)
    S, outputs = 0, []
    for t in range(tokens):
        S = math.exp(-rate) * S + torch.outer(plain(cfg, p["k"][t]), p["v"][t])
        outputs.append(plain(cfg, p["q"][t]) @ S / math.sqrt(cfg.head_k_dim))
    return torch.stack(outputs), S


def deltanet(cfg, p: dict[str, Tensor], w, head: int, tokens: int) -> tuple[Tensor, Tensor]:
    """arXiv:2406.06484, equation 1 and section 3.3."""
    S, outputs = torch.zeros(cfg.head_k_dim, cfg.head_v_dim).double(), []
    for t in range(tokens):
        q, k, v = (silu(cfg, p[name][t]) for name in "qkv")
        if cfg.qk_norm == "l2":
            q, k = normed(q), normed(k)
        else:
            q, k = q / q.abs().sum(), k / k.abs().sum()
        beta = (torch.sigmoid(p["b"][t]) if cfg.use_beta else 1) * (2 if cfg.allow_neg_eigval else 1)
        S = S - beta * torch.outer(k, k @ S) + beta * torch.outer(k, v)
        outputs.append(q @ S / math.sqrt(cfg.head_k_dim))
    return torch.stack(outputs), S


def kda(cfg, p: dict[str, Tensor], w, head: int, tokens: int) -> tuple[Tensor, Tensor]:
    """arXiv:2510.26692, equation 1; the gate of the common library, with and without a lower bound."""
    S, outputs = torch.zeros(cfg.head_k_dim, cfg.head_v_dim).double(), []
    rate = w["A_log"][head].exp()
    for t in range(tokens):
        q, k, v = normed(silu(cfg, p["q"][t])), normed(silu(cfg, p["k"][t])), silu(cfg, p["v"][t])
        logit = p["f"][t] + w["dt_bias"][head]
        alpha = (1 + logit.exp()) ** -rate
        if cfg.lower_bound is not None:
            alpha = torch.exp(cfg.lower_bound / (1 + (-rate * logit).exp()))
        beta = torch.sigmoid(p["b"][t]) * (2 if cfg.allow_neg_eigval else 1)
        S = (torch.eye(len(k)) - beta * torch.outer(k, k)) @ torch.diag(alpha) @ S + beta * torch.outer(k, v)
        outputs.append(q @ S / math.sqrt(cfg.head_k_dim))
    return torch.stack(outputs), S


def products(x: Tensor) -> list[Tensor]:
    """Every product of two different channels, by their distance on a ring."""
    found = {}
    for distance in range(1, len(x) // 2 + 1):
        for i in range(len(x)):
            j = (i + distance) % len(x)
            found.setdefault(frozenset((i, j)), x[i] * x[j])
    return list(found.values())


def softmax_like(weight, phi, cfg, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention by its T x T weights, and the memory by the features of the keys."""
    weights = torch.stack([torch.stack([weight(a @ b / math.sqrt(len(a))) for b in k]) for a in q]).tril()
    S = sum(torch.outer(torch.stack([*phi(b)]), torch.cat([c, torch.ones(1)])) for b, c in zip(k, v))
    return weights @ v / (weights.sum(1, keepdim=True) + cfg.eps), S


def based(cfg, p: dict[str, Tensor], w, head: int, tokens: int) -> tuple[Tensor, Tensor]:
    """arXiv:2402.18668, section 4.1: 1 + x + x^2 / 2 instead of exp x."""

    def phi(x: Tensor) -> list[Tensor]:
        d = len(x)
        quadratic = [x_i**2 / math.sqrt(2 * d) for x_i in x] + [y / math.sqrt(d) for y in products(x)]
        return [torch.tensor(1.0), *(x / d**0.25), *quadratic]

    return softmax_like(lambda s: 1 + s + s**2 / 2, phi, cfg, p["q"], p["k"], p["v"])


def rebased(cfg, p: dict[str, Tensor], w, head: int, tokens: int) -> tuple[Tensor, Tensor]:
    """arXiv:2402.10644, section 4, scaled as in the common library."""

    def phi(x: Tensor) -> list[Tensor]:
        return [x_i**2 / math.sqrt(len(x)) for x_i in x] + [y * math.sqrt(2 / len(x)) for y in products(x)]

    def affine(x: Tensor) -> Tensor:
        if cfg.normalize:
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * (w["gamma"] if cfg.use_gamma else 1) + (w["beta"] if cfg.use_beta else 0)

    return softmax_like(lambda s: s**2, phi, cfg, affine(p["q"]), affine(p["k"]), p["v"])


def rwkv6(cfg, p: dict[str, Tensor], w, head: int, tokens: int) -> tuple[Tensor, Tensor]:
    """arXiv:2404.05892, section 4: the decay of a token applies after it was read, the bonus u instead of it."""
    S, outputs = torch.zeros(cfg.head_k_dim, cfg.head_v_dim).double(), []
    for t in range(tokens):
        now = torch.outer(p["k"][t], p["v"][t])
        outputs.append(p["q"][t] @ (S + torch.diag(w["bonus"][head]) @ now))
        S = torch.diag(torch.exp(-torch.exp(p["w"][t]))) @ S + now
    return torch.stack(outputs), S


def rwkv7(cfg, p: dict[str, Tensor], w, head: int, tokens: int) -> tuple[Tensor, Tensor]:
    """arXiv:2503.14456, equations 4 to 17, of which S is the transpose."""
    S, outputs = torch.zeros(cfg.head_v_dim, cfg.head_k_dim).double(), []
    for t in range(tokens):
        k, v, a = p["k"][t], p["v"][t], 1 / (1 + (-p["a"][t]).exp())
        if "first_v" in p:
            nu = 1 / (1 + (-p["mix"][t]).exp())
            v = (1 - nu) * v + nu * p["first_v"][t]
        kappa = normed(k * w["k_k"][head])
        k = k * (1 - w["k_a"][head] + w["k_a"][head] * a)
        decay = torch.exp(-math.exp(-0.5) / (1 + (-p["w"][t]).exp()))
        S = S @ (torch.diag(decay) - torch.outer(kappa, a * kappa)) + torch.outer(v, k)
        outputs.append(S @ p["q"][t])
    return torch.stack(outputs), S.T


def mamba2(cfg, p: dict[str, Tensor], w, head: int, tokens: int) -> tuple[Tensor, Tensor]:
    """arXiv:2405.21060, equation 1 with the discretisation of section 7; the skip belongs to the read-out."""
    h, outputs = torch.zeros(cfg.head_k_dim, cfg.head_v_dim).double(), []
    for t in range(tokens):
        x, B, C = (silu(cfg, p[name][t]) for name in "xbc")
        dt = torch.log1p((p["dt"][t] + w["dt_bias"][head]).exp())
        dt = dt if dt > cfg.dt_limit_min else cfg.dt_limit_min
        dt = dt if cfg.dt_limit_max is None or dt < cfg.dt_limit_max else cfg.dt_limit_max
        h = (-w["A_log"][head].exp() * dt).exp() * h + dt * torch.outer(B, x)
        outputs.append(C @ h)
    return torch.stack(outputs), h


def turned(cfg, x: Tensor, t: int) -> Tensor:
    """Channels i and i + K/2 as a complex number, times exp(i t theta)."""
    if cfg.rotary == "none":
        return x
    half = len(x) // 2
    theta = torch.tensor([cfg.rotary_base ** (-2 * i / len(x)) for i in range(half)], dtype=torch.float64)
    y = torch.complex(x[:half], x[half:]) * torch.exp(1j * t * theta)
    return torch.cat([y.real, y.imag])


def retention(cfg, p: dict[str, Tensor], w, head: int, tokens: int) -> tuple[Tensor, Tensor]:
    """arXiv:2307.08621, equation 5, and xPos by its powers (arXiv:2212.10554, equation 12), which overflow later."""
    gamma, K = 1 - 2 ** (-5 - head), cfg.head_k_dim
    q, k = (torch.stack([turned(cfg, p[name][t], t) for t in range(tokens)]) for name in "qk")
    power = torch.zeros(K).double()
    if cfg.rotary == "xpos":
        zeta = torch.tensor([(i / (K / 2) + 0.4) / 1.4 for i in range(K // 2)] * 2, dtype=torch.float64)
        power = zeta.log() / 512
    t = torch.arange(tokens)[:, None]
    q, k = q * torch.exp(t * power), k * torch.exp(-t * power)
    D = (gamma ** (t - t.T).double()).tril()
    S = (k * torch.exp((tokens - 1) * power)).T @ (D[-1][:, None] * p["v"])
    return (q @ k.T / math.sqrt(K) * D) @ p["v"], S


def gsa(cfg, p: dict[str, Tensor], w, head: int, tokens: int) -> tuple[Tensor, ...]:
    """arXiv:2409.07146, equation 8."""
    K, V, outputs = 0, 0, []
    for t in range(tokens):
        q, k, v = (p[name][t] * torch.sigmoid(p[name][t]) for name in "qkv")
        alpha = torch.sigmoid(p["f"][t]) ** (1 / cfg.gate_logit_normalizer)
        K = torch.diag(alpha) @ K + torch.outer(1 - alpha, k) if t else torch.outer(1 - alpha, k)
        V = torch.diag(alpha) @ V + torch.outer(1 - alpha, v) if t else torch.outer(1 - alpha, v)
        weights = (K @ q).exp()
        outputs.append(V.T @ (weights / weights.sum()))
    return torch.stack(outputs), K.T, V


def hgrn2(cfg, p: dict[str, Tensor], w, head: int, tokens: int) -> tuple[Tensor, Tensor]:
    """arXiv:2404.07904, equation 3, bounds of arXiv:2311.04823, section 3.3; the scale of the common library."""
    weights = w["lower_bounds"][head].exp() / w["lower_bounds"][head].exp().sum(0)
    bound = weights.cumsum(0)[PLACE.layer_of_kind] - weights[0]
    S, outputs = torch.zeros(cfg.head_k_dim, cfg.head_v_dim).double(), []
    for t in range(tokens):
        g = bound + (1 - bound) * torch.sigmoid(p["f"][t])
        S = torch.diag(g) @ S + torch.outer(1 - g, p["i"][t])
        outputs.append(p["q"][t] * torch.sigmoid(p["q"][t]) @ S / math.sqrt(cfg.head_k_dim))
    return torch.stack(outputs), S


DEFINITIONS: dict[str, Definition] = {
    "linear_attention": linear_attention,
    "gla": gla,
    "gated_deltanet": gated_deltanet,
    "lightning_attention": lightning_attention,
    "deltanet": deltanet,
    "kda": kda,
    "based": based,
    "rebased": rebased,
    "mamba2": mamba2,
    "retention": retention,
    "gsa": gsa,
    "hgrn2": hgrn2,
    "rwkv6": rwkv6,
    "rwkv7": rwkv7,
}


def test_every_mixer_of_the_package_has_its_formulas():
    """But mixtures, which have those of their inner mixers."""
    mixers = {name: mixer_class(name) for name in lsm.names() if not mixer_class(name).uses_hidden}
    package = {name for name, mixer in mixers.items() if mixer.__module__.startswith("linear_moe.")}
    assert package == set(DEFINITIONS)


@pytest.mark.parametrize("name, case", [pair for pair in EVERY_CASE if pair[0] in DEFINITIONS])
def test_formulas(name, case):
    """Outputs before the output norm, final memories and every gradient; the convolution is measured elsewhere.

    The token loop shares ``gates`` with what it measures: a gate that is cut off from its inputs shows here only.
    """
    given = options(name)[case] | {"output_norm": "identity", "output_gate": "none"}
    inputs = make(name, given, batch=1, tokens=6)
    mixer = inputs.mixer
    o, _, state = mixer.recall(inputs.x, inputs.others, inputs.w, inputs.place)
    p, _ = split.split(mixer, inputs.x, inputs.others, inputs.w, inputs.place, MixerState(()), None)
    truth_o, truth_memory = torch.zeros_like(o), tuple(torch.zeros_like(m) for m in state.memory)
    for h in range(mixer.cfg.num_heads):
        own = {key: x[0, :, h * x.shape[2] // mixer.cfg.num_heads] for key, x in p.items()}
        truth_o[0, :, h], *memories = DEFINITIONS[name](mixer.cfg, own, inputs.w, h, 6)
        for truth, memory in zip(truth_memory, memories, strict=True):
            truth[0, h] = memory
    truth = {"o": truth_o} | {f"memory {i}": memory for i, memory in enumerate(truth_memory)}
    found = {"o": o} | {f"memory {i}": memory for i, memory in enumerate(state.memory)}
    leaves = inputs.tensors()
    assert_close(found | gradients(found, leaves), truth | gradients(truth, leaves))

"""RWKV7 (Goose): a memory that removes what it holds under one key, adds it back in part, and fades per channel.

    x_n = x_t + mu_n (x_{t-1} - x_t)           what projection n reads; x_{t-1} is zero at the start of a document
    S_t = diag(exp w_t) S_{t-1} - (a_t kappa_t) (kappa_t^T S_{t-1}) + k'_t v'_t^T
    o_t = S_t^T q_t                            y_t = (GroupNorm(o_t) + (sum_K q_t r_k k'_t) v'_t) g_t

    w_t  = -e^-0.5 sigmoid(A_w tanh(B_w x_w) + b)      log decay, above -0.61
    a_t  = sigmoid(A_a B_a x_a + b)                    in-context learning rate
    kappa_t, k'_t = unit(k_k k_t),  k_t (1 + (a_t - 1) k_a)
    v'_t = v_t + sigmoid(A_v B_v x_v + b) (v_t of the first layer - v_t), v_t in the first layer
    g_t  = A_g sigmoid(B_g x_g)

Letters: B rows, T tokens, D hidden, H heads, K key dim, V value dim.
Source: arXiv:2503.14456, section 4 (q is its receptance r); ranks, initialisation and 1e-6 under the root of the unit
keys as in the common library. A short convolution, which it does not have, leaves the value of the first layer alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from linear_moe.kernels import edit_keys, gated_group_norm, lerp_tokens, log_decay_of
from linear_moe.lsm import output
from linear_moe.lsm.mixer import Mixer, Parameter, Placement, Projection
from linear_moe.lsm.options import one_of, positive
from linear_moe.lsm.recurrence import DiagonalPlusLowRank
from linear_moe.lsm.registry import register
from linear_moe.lsm.tables import channel_places, widen

SLOWEST = math.exp(-0.5)
"""No channel decays by more than ``exp`` of minus this in a token."""

SHIFTS = {"q": "x_r", "w": "x_w", "k": "x_k", "v": "x_v", "mix": "x_v", "a": "x_a", "g": "x_g"}
"""The parameter with which each projection's input is shifted."""


@register("rwkv7")
class RWKV7(DiagonalPlusLowRank):
    """One matrix memory per head, edited under unit keys at a rate per channel."""

    source = "arXiv:2503.14456, section 4"
    token_shift = True
    first_value = "v"

    @dataclass(kw_only=True)
    class Config(Mixer.Config):
        """Options of RWKV7."""

        decay_rank: int = 64
        """Waist of the low-rank decay projection."""
        iclr_rank: int = 64
        """Waist of the low-rank projection of the in-context learning rate."""
        value_rank: int = 16
        """Waist of the low-rank projection that mixes in the first layer's value."""
        gate_rank: int = 128
        """Waist of the low-rank output gate."""
        output_norm: str = "groupnorm"
        """Norm of the output: rmsnorm, groupnorm (mean and bias too) or identity."""
        output_gate: str = "sigmoid"
        """Activation in the waist of the output gate: sigmoid, or none for no gate."""
        norm_eps: float = 1e-5
        """Epsilon of the output norm for each channel of a head: ``head_dim`` times this is added to the variance."""

        def __post_init__(self) -> None:
            super().__post_init__()
            for name, default in (("decay", 64), ("iclr", 64), ("value", 16), ("gate", 128)):
                rank = getattr(self, f"{name}_rank")
                positive(f"{name}_rank", rank, "a projection passes through that many channels", default)
            one_of("output_gate", self.output_gate, ("sigmoid", "none"))

    cfg: Config

    def projections(self) -> tuple[Projection, ...]:
        """q, k, v and, low-rank, the logits of decay, learning rate and share of the first value."""
        cfg, keys = self.cfg, self.cfg.head_k_dim
        return (
            *self.qkv(),
            Projection("w", keys, bias=True, rank=cfg.decay_rank, waist="tanh"),
            Projection("a", keys, bias=True, rank=cfg.iclr_rank),
            Projection("mix", cfg.head_v_dim, bias=True, rank=cfg.value_rank, after_first=True),
        )

    def output_projections(self) -> tuple[Projection, ...]:
        """The output gate, low-rank too."""
        cfg = self.cfg
        gate = Projection("g", cfg.head_v_dim, rank=cfg.gate_rank, waist="sigmoid")
        return () if cfg.output_gate == "none" else (gate,)

    def parameters(self) -> tuple[Parameter, ...]:
        """The shift of each projection's input; per channel, what scales the keys and the bonus."""
        cfg = self.cfg
        shifts = dict.fromkeys(SHIFTS[p.name] for p in self.all_projections())
        keys = (cfg.num_heads, cfg.head_k_dim)
        return (
            *(Parameter(name, (cfg.hidden_size,), torch.nn.init.zeros_, per_head=False) for name in shifts),
            Parameter("k_k", keys, torch.nn.init.ones_),
            Parameter("k_a", keys, lambda x: x.fill_(1.02)),
            Parameter("r_k", keys, lambda x: x.fill_(-0.04)),
        )

    def inputs(self, x_BTD: Tensor, before_BTD: Tensor, w: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each projection reads its own fixed mix of two tokens, channel by channel."""
        names = {p.name: SHIFTS[p.name] for p in self.all_projections()}
        keys = list(dict.fromkeys(names.values()))
        mixes = lerp_tokens(x_BTD, before_BTD, torch.stack([w[key] for key in keys]))
        shifted = dict(zip(keys, mixes, strict=True))
        return {name: shifted[key] for name, key in names.items()}

    def gates(self, p: dict[str, Tensor], w: dict[str, Tensor], place: Placement) -> dict[str, Tensor]:
        """The log decay in float32: it is summed over the whole sequence. ``p`` gets what is written."""
        key, removed, added = edit_keys(p["k"], p["a"], w["k_k"], w["k_a"])
        p["written_k"], p["written_v"] = key, _value(p)
        return {
            "q": p["q"],
            "k": key,
            "v": p["written_v"],
            "a": removed,
            "b": added,
            "log_decay": log_decay_of(p["w"], form="sigmoid", scale=SLOWEST),
        }

    def read_out(
        self, o_BTHV: Tensor, p: dict[str, Tensor], w: dict[str, Tensor], place: Placement
    ) -> Tensor:
        """Norm, add the current token's value as strongly as its key answers the query, gate."""
        cfg = self.cfg
        eps = cfg.head_dim * cfg.norm_eps
        if "written_k" not in p:
            self.gates(p, w, place)
        own = p["q"], p["written_k"], p["written_v"], w["r_k"]
        if cfg.output_norm == "groupnorm":
            weight, bias = w["norm_weight"], w["norm_bias"]
            return gated_group_norm(o_BTHV, weight, bias, p.get("g"), *own, activation=None, eps=eps)
        wide = output.norm(o_BTHV, w, cfg, self.num_norm_groups, place, eps=eps)
        query, key, value, bonus = map(widen, own)
        wide = wide + (query * key * bonus).sum(-1, keepdim=True) * value
        return (wide * p["g"] if "g" in p else wide).to(o_BTHV.dtype)

    @property
    def scale(self) -> float:
        """The read is not scaled: a norm follows."""
        return 1.0

    def initialize(self, found: dict[str, Tensor], place: Placement) -> None:
        """By depth and channel: early layers shift and forget less; the output starts at zero."""
        cfg, depth = self.cfg, place.layer / max(place.num_layers - 1, 1)
        to_go = 1 - place.layer / place.num_layers
        for name, power in {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}.items():
            if name in found:
                channel_D = torch.arange(cfg.hidden_size) / cfg.hidden_size
                found[name].copy_(1 - channel_D ** (power * to_go))
        key_HK = channel_places(cfg.num_heads, cfg.head_k_dim, place)
        value_HV = channel_places(cfg.num_heads, cfg.head_v_dim, place)
        within_K = torch.linspace(-1, 1, cfg.head_k_dim) if cfg.head_k_dim > 1 else torch.zeros(1)
        within_K = within_K * within_K.abs()
        found["k_k"].copy_(0.71 - 0.1 * (key_HK - 0.5))
        biases = {
            "w": -5.5 + 6 * key_HK ** (1 + depth**0.3) + 2.5 * within_K,
            "a": -0.19 + 0.3 * within_K + 0.4 * (key_HK - 0.5),
            "mix": 0.73 - 0.4 * (value_HV - 0.5),
        }
        for name, bias in biases.items():
            if f"low_rank.{name}.up.bias" in found:
                found[f"low_rank.{name}.up.bias"].copy_(bias.flatten())
        if "norm_weight" in found:
            found["norm_weight"].fill_(((place.layer + 1) / place.num_layers) ** 0.7)
        ranks = cfg.num_heads // place.num_heads
        for p in self.all_projections():
            if p.rank is None:
                _orthogonal(found[f"in_proj.{p.name}"], 0.1 if p.name == "k" else 1.0, ranks)
            elif f"low_rank.{p.name}.down" in found:
                found[f"low_rank.{p.name}.down"].zero_()
                _orthogonal(found[f"low_rank.{p.name}.up.weight"], 0.1, ranks)
        found["out_proj.weight"].zero_()


def _value(p: dict[str, Tensor]) -> Tensor:
    """What is written: v'."""
    if "first_v" not in p:
        return p["v"]
    v_BTC, first_BTC, logits_BTC = (p[name].flatten(2) for name in ("v", "first_v", "mix"))
    (mixed_BTC,) = lerp_tokens(v_BTC, first_BTC, logits=logits_BTC.unsqueeze(2), activation="sigmoid")
    return mixed_BTC.view_as(p["v"])


def _orthogonal(x: Tensor, gain: float, ranks: int) -> None:
    """Orthogonal rows or columns, ``[.., in]``, as large as if they were a part of the whole of all ``ranks``."""
    flat = torch.empty(x[..., 0].numel(), x.shape[-1], device=x.device)
    rows, columns = flat.shape
    share = math.sqrt(max(rows, columns) / max(rows * ranks, columns))
    torch.nn.init.orthogonal_(flat, gain * share)
    x.copy_(flat.view(x.shape))

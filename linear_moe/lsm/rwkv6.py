"""RWKV6 (Finch): a memory that fades per key channel, read by a token shift that each token chooses for itself.

    x'_t = x_{t-1} - x_t                           zero before the first token of a document
    m_n  = b_n + U_n tanh(W_n (x_t + mu x'_t))     for each projection n of q, w, k, v, g
    x_n  = x_t + m_n x'_t                          what that projection reads
    S_t  = diag(a_t) S_{t-1} + k_t v_t^T           a_t = exp(-exp(w_t)), w_t = A tanh(B x_w) + b
    o_t  = (S_{t-1} + diag(u) k_t v_t^T)^T q_t     y_t = GroupNorm(o_t) silu(g_t)

Letters: B rows, T tokens, N tokens of all rows, D hidden, S streams, R rank of the shift, H heads, K key dim,
V value dim.
Source: arXiv:2404.05892, sections 3 and 4 (q is its receptance r). mu, u and every b start by layer and channel as in
the authors' code (github.com/BlinkDL/RWKV-LM, RWKV-v5, x060); the common library starts them at zero, so that every
channel fades by 1 / e a token, and then recall is not learned (examples/recall). Where else it differs from the authors
we follow the library: keys of half width, and the norm has the epsilon it is given (the authors': 64 times that).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.kernels import lerp_tokens, log_decay_of
from linear_moe.lsm.mixer import Mixer, Parameter, Placement, Projection
from linear_moe.lsm.options import positive
from linear_moe.lsm.recurrence import DiagonalDecay
from linear_moe.lsm.registry import register
from linear_moe.lsm.tables import channel_places, widen

SHIFT_POWERS = {"w": 1.0, "k": 1.0, "v": 1.0, "q": 0.5, "g": 0.5}
"""How fast the token shift of a stream falls off over the channels when training starts."""


@register("rwkv6")
class RWKV6(DiagonalDecay):
    """One matrix memory per head with a decay per key channel and a bonus for the current token."""

    source = "arXiv:2404.05892, sections 3 and 4"
    token_shift = True

    @dataclass(kw_only=True)
    class Config(Mixer.Config):
        """Options of RWKV6."""

        expand_k: float = 0.5
        """Key dim per head is ``expand_k * head_dim``."""
        shift_rank: int = 32
        """Waist of the map that chooses the token shift, for each projection."""
        decay_rank: int = 64
        """Waist of the low-rank decay projection."""
        output_norm: str = "groupnorm"
        """Norm of the output: rmsnorm, groupnorm (mean and bias too) or identity."""

        def __post_init__(self) -> None:
            super().__post_init__()
            positive("shift_rank", self.shift_rank, "the token shift passes through that many channels", 32)
            positive("decay_rank", self.decay_rank, "the decay passes through that many channels", 64)

    cfg: Config

    def projections(self) -> tuple[Projection, ...]:
        """q, k, v and the low-rank decay logit w."""
        decay = Projection("w", self.cfg.head_k_dim, bias=True, rank=self.cfg.decay_rank, waist="tanh")
        return (*self.qkv(), decay)

    def parameters(self) -> tuple[Parameter, ...]:
        """The bonus u, float32 in any model, and the maps of the token shift, which all heads share."""
        cfg, zeros = self.cfg, torch.nn.init.zeros_
        streams, hidden = len(self._streams), cfg.hidden_size
        return (
            Parameter("bonus", (cfg.num_heads, cfg.head_k_dim), zeros, keep_float32=True),
            Parameter("x_mu", (hidden,), zeros, per_head=False),
            Parameter("x_bias", (streams, hidden), zeros, per_head=False),
            Parameter("x_down", (streams * cfg.shift_rank, hidden), None, per_head=False),
            Parameter("x_up", (streams, hidden, cfg.shift_rank), None, per_head=False),
        )

    def inputs(self, x_BTD: Tensor, before_BTD: Tensor, w: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each projection reads its own mix of two tokens, channel by channel."""
        (mixed_BTD,) = lerp_tokens(x_BTD, before_BTD, w["x_mu"].unsqueeze(0))
        # Tokens outside of rows, as Megatron has them in memory: nothing is copied, and one product serves all streams.
        waist_TBC = torch.tanh(F.linear(mixed_BTD.transpose(0, 1), w["x_down"]))
        waist_SNR = waist_TBC.flatten(0, 1).unflatten(-1, (len(self._streams), -1)).transpose(0, 1)
        logits_SND = torch.bmm(waist_SNR, w["x_up"].transpose(1, 2))
        logits_BTSD = logits_SND.unflatten(1, waist_TBC.shape[:2]).permute(2, 1, 0, 3)
        mixes = lerp_tokens(x_BTD, before_BTD, w["x_bias"], logits_BTSD)
        return dict(zip(self._streams, mixes, strict=True))

    def initialize(self, found: dict[str, Tensor], place: Placement) -> None:
        """By depth and channel: early layers shift more and forget less, some channels for good, some within tokens."""
        cfg, depth = self.cfg, place.layer / max(place.num_layers - 1, 1)
        to_go = 1 - place.layer / place.num_layers
        channel_D = torch.arange(cfg.hidden_size) / cfg.hidden_size
        found["x_mu"].copy_(1 - channel_D**to_go)
        for bias_D, name in zip(found["x_bias"], self._streams, strict=True):
            bias_D.copy_(
                1 - channel_D ** (SHIFT_POWERS[name] * to_go) - (0.3 * depth if name == "v" else 0.0)
            )
        key_HK = channel_places(cfg.num_heads, cfg.head_k_dim, place)
        found["low_rank.w.up.bias"].copy_((-6 + 5 * key_HK ** (0.7 + 1.3 * depth)).flatten())
        index_HK = (key_HK * (cfg.num_heads * cfg.head_k_dim - 1)).round()
        found["bonus"].copy_(depth * (1 - key_HK) + 0.1 * ((index_HK + 1) % 3 - 1))

    def gates(self, p: dict[str, Tensor], w: dict[str, Tensor], place: Placement) -> dict[str, Tensor]:
        """The log decay in float32: it is summed over the whole sequence."""
        log_decay_BTHK = log_decay_of(p["w"], form="exp")
        return {
            "q": p["q"],
            "k": p["k"],
            "v": p["v"],
            "log_decay": log_decay_BTHK,
            "bonus": widen(w["bonus"]),
        }

    @property
    def scale(self) -> float:
        """The read is not scaled: a norm follows."""
        return 1.0

    def extra_flops_per_token(self) -> int:
        """The two maps of the token shift."""
        return 4 * len(self._streams) * self.cfg.shift_rank * self.cfg.hidden_size

    @property
    def _streams(self) -> tuple[str, ...]:
        """The projections, in the order of the library's maps."""
        return ("q", "w", "k", "v", "g") if self.cfg.output_gate != "none" else ("q", "w", "k", "v")

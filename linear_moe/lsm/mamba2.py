"""Mamba2: a memory that fades per head at a rate each token chooses, written as strongly as it fades (SSD).

    S_t = exp(-exp(A_log) dt_t) S_{t-1} + dt_t B_t x_t^T      dt_t = clamp(softplus(W_dt u_t + dt_bias))
    y_t = S_t^T C_t + D x_t                                   x, B, C = silu(conv(W u)), u the layer's input
    o_t = RMSNorm(y_t silu(z_t))                              one norm for the heads of a group

B and C, the keys and queries, are shared by a group of heads: head h of H uses group h // (H / G).

Letters: B rows, T tokens, H heads here, G groups here, K state size (key dim), V value dim.
Source: arXiv:2405.21060, sections 6 and 7; widths, initialisation and the norm after the gate as in the common library,
whose norm spans a group of heads too. Its torch path gives the heads other groups than this, a defect. With a whole
number of groups per rank, tensor parallelism sends nothing for the norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe.kernels import scale_heads, skip_gate_norm
from linear_moe.lsm import output
from linear_moe.lsm.gating import activated, init_dt_bias, init_log_rate
from linear_moe.lsm.mixer import Mixer, Parameter, Placement, Projection
from linear_moe.lsm.options import check_given, heads_in, kernel_width, one_of, positive, whole_width
from linear_moe.lsm.recurrence import DiagonalDecay
from linear_moe.lsm.registry import register
from linear_moe.lsm.tables import widen


@register("mamba2")
class Mamba2(DiagonalDecay):
    """One matrix memory per head, with a scalar decay per head and keys and queries shared by groups of heads."""

    source = "arXiv:2405.21060, sections 6 and 7"
    norm_weight_per_head: ClassVar[bool] = True

    @dataclass(kw_only=True)
    class Config(Mixer.Config):
        """Options of Mamba2; in a model it has heads of its own, not those of the softmax layers."""

        expand: float = 2.0
        """The heads of the layer have ``expand * hidden_size`` channels together."""
        ssm_head_dim: int = 64
        """``head_dim`` in a model: its heads are ``expand * hidden_size / ssm_head_dim``."""
        state_size: int = 128
        """Channels of B and C."""
        num_groups: int = 1
        """Groups of heads that share B, C and the output norm; one per tensor-parallel rank is cheapest."""
        expand_k: float = 1.0
        """B and C have ``expand_k * state_size`` channels."""
        qkv_bias: bool = False
        """Learned bias on x (Qwen2); B and C have that of the convolution."""
        conv_size: int = 4
        """Width of the causal short convolution on x, B and C; 0: none (then SiLU alone)."""
        conv_bias: bool = True
        """Learned bias of the short convolution."""
        dt_limit_min: float = 0.0
        """The step dt is at least that."""
        dt_limit_max: float | None = None
        """And at most that; None: no limit."""

        @classmethod
        def from_model(
            cls, *, hidden_size: int, num_heads: int, head_dim: int, **options: Any
        ) -> Mamba2.Config:
            """As many heads of ``ssm_head_dim`` as ``expand * hidden_size`` channels make."""
            check_given(cls, options)
            head_dim = options.get("ssm_head_dim", cls.ssm_head_dim)
            channels = options.get("expand", cls.expand) * hidden_size
            num_heads = heads_in(channels, "ssm_head_dim", head_dim)
            return cls(hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim, **options)

        def __post_init__(self) -> None:
            super().__post_init__()
            one_of("output_norm", self.output_norm, ("rmsnorm", "identity"))
            positive("expand", self.expand, "it multiplies hidden_size", 2.0)
            positive("ssm_head_dim", self.ssm_head_dim, "a head has that many channels", 64)
            positive("state_size", self.state_size, "B and C have that many channels", 128)
            whole_width("expand_k", self.expand_k, "state_size", self.state_size, "B and C")
            kernel_width("state_size", self.state_size, self.head_k_dim, "state_size 128")
            if self.num_groups < 1 or self.num_heads % self.num_groups:
                raise ValueError(
                    f"num_groups is {self.num_groups}\n"
                    f"  why: every group has the same number of the {self.num_heads} heads\n"
                    f"  try: num_groups 1"
                )
            if self.dt_limit_min < 0:
                raise ValueError(
                    f"dt_limit_min is {self.dt_limit_min}\n"
                    f"  why: a negative step would make the memory grow\n"
                    f"  try: 0.0"
                )
            if self.dt_limit_max is not None and self.dt_limit_max <= self.dt_limit_min:
                raise ValueError(
                    f"dt_limit_max is {self.dt_limit_max}\n"
                    f"  why: it must be above dt_limit_min {self.dt_limit_min}, or dt would not depend on the token\n"
                    f"  try: 0.1, or None"
                )

        @property
        def head_k_dim(self) -> int:
            """K."""
            return int(self.expand_k * self.state_size)

    cfg: Config

    def projections(self) -> tuple[Projection, ...]:
        """x of each head, B and C of each group, through the short convolution, and the logit of the step dt."""
        cfg, conv = self.cfg, self.cfg.conv_size > 0
        groups = [Projection(name, cfg.head_k_dim, conv=conv, grouped=True) for name in ("b", "c")]
        return (Projection("x", cfg.head_v_dim, cfg.qkv_bias, conv=conv), *groups, Projection("dt", 1))

    def parameters(self) -> tuple[Parameter, ...]:
        """The rate of the decay, the bias of the step and the weight of the skip, float32 in any model."""
        heads = (self.cfg.num_heads,)
        return (
            Parameter("A_log", heads, init_log_rate, keep_float32=True),
            Parameter("dt_bias", heads, init_dt_bias, keep_float32=True),
            Parameter("D", heads, torch.nn.init.ones_, keep_float32=True),
        )

    def gates(self, p: dict[str, Tensor], w: dict[str, Tensor], place: Placement) -> dict[str, Tensor]:
        """The step and the decay in float32; the step scales the values."""
        dt_BTH = F.softplus(widen(p["dt"]).squeeze(-1) + widen(w["dt_bias"]))
        dt_BTH = dt_BTH.clamp(self.cfg.dt_limit_min, self.cfg.dt_limit_max)
        x_BTHV, b_BTGK, c_BTGK = (activated(p[name], self.cfg.conv_size) for name in "xbc")
        return {
            "q": self._per_head(c_BTGK, place),
            "k": self._per_head(b_BTGK, place),
            "v": scale_heads(x_BTHV, dt_BTH),
            "log_decay": -widen(w["A_log"]).exp() * dt_BTH,
        }

    def read_out(
        self, o_BTHV: Tensor, p: dict[str, Tensor], w: dict[str, Tensor], place: Placement
    ) -> Tensor:
        """Add the skip, gate, then norm over the heads of a group."""
        per_group = self.cfg.num_heads // self.cfg.num_groups
        if self.cfg.output_norm == "rmsnorm" and place.num_heads % per_group == 0:
            return skip_gate_norm(
                o_BTHV,
                activated(p["x"], self.cfg.conv_size),
                w["D"],
                w["norm_weight"],
                None if self.cfg.output_gate == "none" else p["g"],
                num_groups=place.num_heads // per_group,
                activation=self.cfg.output_gate if self.cfg.output_gate == "sigmoid" else "swish",
                eps=self.cfg.norm_eps,
            )
        y_BTHV = widen(o_BTHV) + widen(w["D"]).unsqueeze(-1) * activated(p["x"], self.cfg.conv_size)
        gated = output.gate(y_BTHV, p.get("g"), self.cfg.output_gate)
        return output.norm(gated, w, self.cfg, self.num_norm_groups, place).to(o_BTHV.dtype)

    @property
    def scale(self) -> float:
        """C reads as it is."""
        return 1.0

    @property
    def num_groups(self) -> int:
        """Groups of heads with one B and C."""
        return self.cfg.num_groups

    @property
    def num_norm_groups(self) -> int:
        """The same groups."""
        return self.cfg.num_groups

    def _per_head(self, x_BTGK: Tensor, place: Placement) -> Tensor:
        """As the kernels take it: equal groups of heads share, or a copy for each head where a rank cuts a group."""
        per_group = self.cfg.num_heads // self.cfg.num_groups
        first = place.first_head % per_group
        if x_BTGK.shape[2] == 1 or (first == 0 and place.num_heads % per_group == 0):
            return x_BTGK
        heads = torch.arange(first, first + place.num_heads, device=x_BTGK.device)
        return x_BTGK.index_select(2, heads // per_group)

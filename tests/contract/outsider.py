"""A mixer that lives outside the package, made of what the package's own seldom use: two memories, decay by place.

    S1_t = a S1_{t-1} + k_t s_t^T               a = exp(-2^-h (layer + 1) / num_layers - exp(rate)), h the global head
    S2_t = S2_{t-1} diag(c_t) + p_t v_t^T       c_t = sigmoid(v_t), p_t = softmax(s_t)
    o_t = K^-1/2 S2_t^T softmax(S1_t^T q_t + shift)

Letters: B runs, T tokens, H heads, K key dim, M slots, V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe import kernels
from linear_moe.kernels import reference
from linear_moe.lsm import Mixer, Parameter, Placement, Projection
from linear_moe.lsm.mixer import Memory
from linear_moe.lsm.options import kernel_width, positive
from linear_moe.lsm.tables import widen


class Outsider(Mixer):
    """Not registered: the tests do that, and only where they run."""

    name = "outsider"
    family = "diagonal decay"
    source = "tests/contract/outsider.py"

    @dataclass(kw_only=True)
    class Config(Mixer.Config):
        """Options of the outsider."""

        num_slots: int = 6
        """Rows of the second memory."""
        is_soft: bool = True
        """Softmax over the slots that are written."""

        def __post_init__(self) -> None:
            super().__post_init__()
            positive("num_slots", self.num_slots, "the second memory has that many rows", 6)
            kernel_width("num_slots", self.num_slots, self.num_slots, "num_slots 6")

    cfg: Config

    def projections(self) -> tuple[Projection, ...]:
        slots = Projection("s", self.cfg.num_slots, bias=True)
        return (*self.qkv(), slots, Projection("c", self.cfg.head_v_dim, rank=2))

    def parameters(self) -> tuple[Parameter, ...]:
        return (
            Parameter("rate", (self.cfg.num_heads,), lambda x: x.uniform_(-2, -1), keep_float32=True),
            Parameter("shift", (self.cfg.num_slots,), torch.nn.init.normal_, per_head=False),
        )

    def gates(self, p: dict[str, Tensor], w: dict[str, Tensor], place: Placement) -> dict[str, Tensor]:
        rate_H = widen(w["rate"]).exp()
        head_H = torch.arange(place.num_heads, device=rate_H.device) + place.first_head
        depth = (place.layer + 1) / place.num_layers
        slots_BTHM = p["s"].softmax(-1) if self.cfg.is_soft else p["s"]
        return {
            "q": p["q"],
            "k": p["k"],
            "v": p["v"],
            "slots": slots_BTHM.to(p["v"].dtype),
            "shift": widen(w["shift"]),
            "log_decay": -(depth * 2.0**-head_H) - rate_H,
            "log_decay_v": F.logsigmoid(widen(p["c"]) + 2),
        }

    def scan(self, **arguments: Any) -> tuple[Tensor, Memory]:
        return self._run(kernels, **arguments)

    def reference(self, **arguments: Any) -> tuple[Tensor, Memory]:
        return self._run(reference, **arguments)

    def segment(self, *, cu_seqlens: Tensor | None, **gated: Tensor) -> tuple[kernels.Segment, ...]:
        k, v, slots, log_decay = (gated[name] for name in ("k", "v", "slots", "log_decay"))
        return (
            kernels.diag_decay_segment(k, slots, log_decay, cu_seqlens=cu_seqlens),
            kernels.diag_decay_segment(slots, v, log_decay_v=gated["log_decay_v"], cu_seqlens=cu_seqlens),
        )

    def _run(
        self, module: ModuleType, *, state: Memory | None, cu_seqlens: Tensor | None, **g: Tensor
    ) -> tuple[Tensor, Memory]:
        first, second = state if state else (None, None)
        read_BTHM, m1 = module.diag_decay(
            g["q"], g["k"], g["slots"], g["log_decay"], state=first, cu_seqlens=cu_seqlens
        )
        q_BTHM = (widen(read_BTHM) + g["shift"]).softmax(-1).to(read_BTHM.dtype)
        o, m2 = module.diag_decay(
            q_BTHM,
            g["slots"],
            g["v"],
            log_decay_v=g["log_decay_v"],
            scale=self.scale,
            state=second,
            cu_seqlens=cu_seqlens,
        )
        return o, (m1, m2)

    def memory_shapes(self) -> tuple[tuple[int, int], ...]:
        return (self.cfg.head_k_dim, self.cfg.num_slots), (self.cfg.num_slots, self.cfg.head_v_dim)

    def scan_flops_per_token(self) -> int:
        return sum(4 * k * v for k, v in self.memory_shapes())

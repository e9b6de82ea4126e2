"""Gated slot attention: softmax attention over a few slots, each a gated average of the keys and of the values.

    s_t  = 1 - a_t                                 a_t = sigmoid(W_f x_t) ** (1 / 8), of M slots
    Kt_t = Kt_{t-1} diag(a_t) + k_t s_t^T          keys of the slots, K x M
    Vt_t = diag(a_t) Vt_{t-1} + s_t v_t^T          values of the slots, M x V
    o_t  = Vt_t^T softmax(Kt_t^T q_t)

Both memories S_t = [Kt_t, Vt_t] depend on inputs only, so what a run does to them needs no softmax.

Letters: B rows, T tokens, N runs, H heads, K key dim, V value dim, M slots.
Source: arXiv:2409.07146, section 3. As in the common library: swish of q and k and SiLU of v, after the short
convolution's own if there is one; read-out RMSNorm(silu(o)) over the full width; no scale; no output gate. Its options
of norm and gate do nothing; here a gate multiplies the normed output. Its grouped keys are not offered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_moe import kernels
from linear_moe.kernels import Segment, log_decay_of, reference
from linear_moe.kernels.arriving import states_of
from linear_moe.lsm.mixer import Memory, Mixer, Placement, Projection
from linear_moe.lsm.options import kernel_width, one_of, positive
from linear_moe.lsm.recurrence import DiagonalDecay
from linear_moe.lsm.registry import register
from linear_moe.lsm.tables import widen


@register("gsa")
class GatedSlotAttention(DiagonalDecay):
    """Two matrix memories per head, the keys and the values of its slots."""

    source = "arXiv:2409.07146, section 3"

    @dataclass(kw_only=True)
    class Config(Mixer.Config):
        """Options of gated slot attention."""

        num_slots: int = 64
        """M: slots of each head."""
        gate_logit_normalizer: float = 8.0
        """Divides the log of the gate: the larger, the longer the memory at initialisation."""
        output_norm: str = "rmsnorm"
        """Norm of the output over the full width: rmsnorm or identity."""
        output_gate: str = "none"
        """Activation of the output gate: swish, sigmoid or none."""

        def __post_init__(self) -> None:
            super().__post_init__()
            one_of("output_norm", self.output_norm, ("rmsnorm", "identity"))
            positive("num_slots", self.num_slots, "a head averages its keys and values into that many", 64)
            kernel_width("num_slots", self.num_slots, self.num_slots, "num_slots 64")
            why = "the log of the gate is divided by it, and a memory must not grow"
            positive("gate_logit_normalizer", self.gate_logit_normalizer, why, 8.0)

    cfg: Config

    def projections(self) -> tuple[Projection, ...]:
        """q, k, v and the logits f of the slots' gates."""
        return (*self.qkv(), Projection("f", self.cfg.num_slots))

    def gates(self, p: dict[str, Tensor], w: dict[str, Tensor], place: Placement) -> dict[str, Tensor]:
        """Activate q, k and v; the log decay in float32, what a slot takes in from it."""
        log_decay_BTHM = log_decay_of(p["f"], form="log_sigmoid", scale=1 / self.cfg.gate_logit_normalizer)
        return {
            "q": F.silu(p["q"]),
            "k": F.silu(p["k"]),
            "v": F.silu(p["v"]),
            "s": -torch.expm1(log_decay_BTHM).to(p["v"].dtype),
            "log_decay": log_decay_BTHM,
        }

    def scan(
        self, *, state: Memory | None, cu_seqlens: Tensor | None, **gated: Tensor
    ) -> tuple[Tensor, Memory]:
        """``[B, T, H, V]`` outputs and both memories after every run."""
        return _two_scans(kernels.diag_decay, state, cu_seqlens, **gated)

    def segment(self, *, cu_seqlens: Tensor | None, **gated: Tensor) -> tuple[Segment, ...]:
        """Fades the columns of one memory and the rows of the other by the products of the decays, and adds."""
        s, log_decay = gated["s"], gated["log_decay"]
        keys = kernels.diag_decay_segment(gated["k"], s, log_decay_v=log_decay, cu_seqlens=cu_seqlens)
        values = kernels.diag_decay_segment(s, gated["v"], log_decay, cu_seqlens=cu_seqlens)
        return keys, values

    def reference(
        self, *, state: Memory | None, cu_seqlens: Tensor | None, **gated: Tensor
    ) -> tuple[Tensor, Memory]:
        """The definition, one token at a time."""
        return _two_scans(reference.diag_decay, state, cu_seqlens, **gated)

    def read_out(
        self, o_BTHV: Tensor, p: dict[str, Tensor], w: dict[str, Tensor], place: Placement
    ) -> Tensor:
        """SiLU, then the norm, then the gate."""
        return super().read_out(F.silu(widen(o_BTHV)), p, w, place).to(o_BTHV.dtype)

    @property
    def num_norm_groups(self) -> int:
        """One norm over the full width."""
        return 1

    def memory_shapes(self) -> tuple[tuple[int, int], ...]:
        """Keys and values of the slots."""
        return ((self.cfg.head_k_dim, self.cfg.num_slots), (self.cfg.num_slots, self.cfg.head_v_dim))


def _two_scans(
    diag_decay: Callable[..., tuple[Tensor, Tensor]],
    state: Memory | None,
    cu_seqlens: Tensor | None,
    **gated: Tensor,
) -> tuple[Tensor, Memory]:
    """Read the keys of the slots, then their values by the softmax of that."""
    q, k, v, s, log_decay = (gated[name] for name in ("q", "k", "v", "s", "log_decay"))
    keys, values = states_of(state, 2)
    scores_BTHM, keys = diag_decay(q, k, s, log_decay_v=log_decay, state=keys, cu_seqlens=cu_seqlens)
    slots_BTHM = torch.softmax(widen(scores_BTHM), dim=-1).to(v.dtype)
    o, values = diag_decay(slots_BTHM, s, v, log_decay, state=values, cu_seqlens=cu_seqlens)
    return o, (keys, values)

"""What Based and ReBased share: normalised attention over features that are products of two channels of short q and k.

    S_t = S_{t-1} + phi(k_t) v_t^T
    o_t = S_t^T phi(q_t) / (phi(q_t) . sum_{s <= t} phi(k_s) + eps),    phi(q) . phi(k) = weight(q . k)

The products of phi(q) . phi(k) cancel where q and k are nearly orthogonal: a small weight is read with an error of
u |phi(q)| |phi(k)|, u the rounding of phi's dtype, and may come out negative. The sum over a few tokens may be as
small, and the output and all gradients are divided by it. So the first tokens of every run take their weights on each
other from q . k, at least in float32, where nothing cancels. Calls of few tokens, as in decoding, have phi in float32,
and so has the memory that they leave. What remains: a query that is nearly orthogonal to all keys of a long run (in
bfloat16 cosines of 0.03 cost ReBased a tenth of the output), and a memory of few tokens that a longer call has left.

Letters: B rows, T tokens, N runs, C first tokens of a run, H heads, K channels of a query or key, F channels of phi,
V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linear_moe.kernels import Segment
from linear_moe.kernels.autocast import without_autocast
from linear_moe.lsm.first_tokens import FirstTokens
from linear_moe.lsm.mixer import Memory, Mixer, Placement, Projection
from linear_moe.lsm.normalizer import NormalizedSum
from linear_moe.lsm.options import kernel_width, positive, whole_width
from linear_moe.lsm.tables import widen

NUM_EXACT = 16
"""C: with random q and k, sums over more tokens lose no more than a few roundings (99 % of ReBased's, in bfloat16)."""


class QuadraticAttention(NormalizedSum):
    """A mixer says phi and what it makes of q . k: ``short``, ``features``, ``weights``, and how many features."""

    @dataclass(kw_only=True)
    class Config(Mixer.Config):
        """Short queries and keys; by default neither norm nor gate, as in the common library."""

        feature_dim: int = 16
        """Channels of a query or key, before the feature map; not those of a softmax layer's head."""
        expand_k: float = 1.0
        """Queries and keys have ``expand_k * feature_dim`` channels."""
        eps: float = 1e-6
        """Added to the sum of the weights."""
        output_norm: str = "identity"
        """Norm of the output: rmsnorm, groupnorm (mean and bias too) or identity."""
        output_gate: str = "none"
        """Activation of the output gate: swish, sigmoid or none."""

        def __post_init__(self) -> None:
            super().__post_init__()
            positive("feature_dim", self.feature_dim, "queries and keys have that many channels", 16)
            positive("eps", self.eps, "outputs are divided by it where all weights are 0", 1e-6)
            whole_width("expand_k", self.expand_k, "feature_dim", self.feature_dim, "queries and keys")
            kernel_width(
                "feature_dim", self.feature_dim, self.num_features, "feature_dim 16 with expand_k 1.0"
            )
            kernel_width("expand_v", self.expand_v, self.head_v_dim + 1, "a smaller expand_v, or more heads")

        @property
        def head_k_dim(self) -> int:
            """K."""
            return int(self.expand_k * self.feature_dim)

        @property
        def num_features(self) -> int:
            """F."""
            return self.head_k_dim * (self.head_k_dim + 1) // 2

    cfg: Config

    def projections(self) -> tuple[Projection, ...]:
        """q and k of ``feature_dim`` channels, and v."""
        return self.qkv()

    def short(self, x: Tensor, w: dict[str, Tensor]) -> Tensor:
        """Queries or keys ``[..., K]`` before phi, in any dtype."""
        raise NotImplementedError

    def features(self, short: Tensor) -> Tensor:
        """phi: ``[..., K]`` to ``[..., F]``, at least float32."""
        raise NotImplementedError

    def weights(self, products: Tensor) -> Tensor:
        """``phi(q) . phi(k)`` from ``q . k``."""
        raise NotImplementedError

    def gates(self, p: dict[str, Tensor], w: dict[str, Tensor], place: Placement) -> dict[str, Tensor]:
        """phi of q and k, beside themselves; the normaliser is one more value channel that is always 1."""
        short_q, short_k = (self.short(p[name], w) for name in "qk")
        q, k = self.features(short_q), self.features(short_k)
        if q.shape[1] > NUM_EXACT:
            q, k = q.to(p["v"].dtype), k.to(p["v"].dtype)
        return {"q": q, "k": k, "v": self.with_ones(p["v"]), "short_q": short_q, "short_k": short_k}

    def scan(
        self, *, state: Memory | None, cu_seqlens: Tensor | None, **gated: Tensor
    ) -> tuple[Tensor, Memory]:
        """``[B, T, H, V]`` outputs and the memory after every run."""
        v = gated["v"]
        sums, memory = self.sums(state=state, cu_seqlens=cu_seqlens, **_mapped(gated))
        values, weights = sums[..., :-1], sums[..., -1:]
        if v.shape[1] == 1:  # decoding: in float32, and next to nothing is read but the memory
            return self.divided(values, weights).to(v.dtype), memory
        first = FirstTokens.of(v.shape[1], cu_seqlens, NUM_EXACT)
        with without_autocast(v.device):
            short_q, short_k, first_v = (first.of_each(gated[name]) for name in ("short_q", "short_k", "v"))
            exact = self._exactly(short_q, short_k, first_v, state)
        weights = first.replaced(weights, torch.ones_like(exact[..., :1]))  # 0 / 0 would have a gradient
        return first.replaced(self.divided(values, weights), exact).to(v.dtype), memory

    def segment(self, *, cu_seqlens: Tensor | None, **gated: Tensor) -> tuple[Segment, ...]:
        """What the tokens of every run do to any memory."""
        return super().segment(cu_seqlens=cu_seqlens, **_mapped(gated))

    def reference(
        self, *, state: Memory | None, cu_seqlens: Tensor | None, **gated: Tensor
    ) -> tuple[Tensor, Memory]:
        """The definition, one token at a time, by phi alone."""
        o, memory = super().reference(state=state, cu_seqlens=cu_seqlens, **_mapped(gated))
        return o.to(gated["v"].dtype), memory

    def _exactly(self, short_q: Tensor, short_k: Tensor, v: Tensor, state: Memory | None) -> Tensor:
        """``[N, C, H, V]`` outputs of runs of few tokens ``[N, C, H, ...]``, at least float32."""
        q_NHCK, k_NHCK, v_NHCV = (widen(x).transpose(1, 2) for x in (short_q, short_k, v))
        sums = self.weights(q_NHCK @ k_NHCK.mT).tril() @ v_NHCV
        if state:
            sums = sums + self.features(q_NHCK) @ state[0].to(sums.dtype)
        return self.divided(sums[..., :-1], sums[..., -1:]).transpose(1, 2)

    @property
    def normalizer_eps(self) -> float:
        """Added to the sum of the weights."""
        return self.cfg.eps

    @property
    def scale(self) -> float:
        """phi has it."""
        return 1.0

    @property
    def num_keys(self) -> int:
        """F: channels of phi."""
        return self.cfg.num_features


def _mapped(gated: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the kernels take, in one dtype."""
    return {"q": gated["q"], "k": gated["k"], "v": gated["v"].to(gated["k"].dtype)}

"""What Based and ReBased share: normalised attention over features that are products of two channels of short q and k.

    S_t = S_{t-1} + phi(k_t) v_t^T
    o_t = S_t^T phi(q_t) / (phi(q_t) . sum_{s <= t} phi(k_s) + eps)

Letters: K channels of a query or key, F channels of phi, V value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from linear_moe.lsm.mixer import Mixer, Projection
from linear_moe.lsm.normalizer import NormalizedSum
from linear_moe.lsm.options import kernel_width, positive, whole_width


class QuadraticAttention(NormalizedSum):
    """A mixer says phi: ``gates``, and how many features it has."""

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

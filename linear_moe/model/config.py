"""The transformer config of a Linear-MoE model: Megatron's, plus which mixer every layer has and its options."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from linear_moe import lsm
from linear_moe.lsm import Mixer
from linear_moe.model.mixer_options import check_layout, check_supported, config_of
from linear_moe.model.pattern import SOFTMAX


@dataclass(kw_only=True)
class LinearMoEConfig(TransformerConfig):
    """Megatron's config with the layer pattern resolved to one kind per layer."""

    layer_kinds: list[str] = field(default_factory=list)
    """One kind per layer: a registered mixer, or softmax."""
    mixer_options: dict[str, dict[str, object]] = field(default_factory=dict)
    """Options per mixer that differ from its defaults, by field name of its Config."""
    lsm_recompute: bool = False
    """Recompute everything between the projections of mixer layers in the backward pass."""
    recompute_expert_inputs: bool = False
    """Gather the tokens of the experts again in the backward pass: a copy for each that they chose is not kept."""
    expert_gradients_in_place: bool | None = None
    """Add the gradients of the experts' weights to their float32 sums in the product that computes them; ``None``:
    where a fused kernel does so faster, on Hopper."""
    has_cond_embedder: bool = False
    """Sum the gradients of tables that every pipeline stage has (Megatron's name for it)."""
    sequential_experts: bool = False
    """Use Megatron's loop over experts instead of grouped GEMM (for comparisons)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        assert len(self.layer_kinds) == self.num_layers, (self.layer_kinds, self.num_layers)
        if self.num_moe_experts is not None and not self.moe_ffn_hidden_size:
            raise ValueError(
                f"the {self.num_moe_experts} experts have no width\n"
                f"  why: without one of their own it is that of the feed-forward blocks, which this model has not\n"
                f"  try: --moe-ffn-hidden-size {2 * self.hidden_size}, or no experts"
            )
        # Megatron then gives every layer its own checkpoint keys (TransformerBlock.sharded_state_dict): by default all
        # layers share keys with an axis for the layer, which needs layers of one kind.
        self.hetereogenous_dist_checkpoint = True
        for kind in sorted(set(self.layer_kinds) - {SOFTMAX}):
            self._prepare(kind)

    def _prepare(self, kind: str) -> None:
        """What a mixer asks of Megatron."""
        mixer = lsm.get(kind)(mixer_config(kind, self))
        recomputes_layers = self.recompute_granularity == "full"
        layouts = {
            "TP": self.tensor_model_parallel_size > 1,
            "SP": self.sequence_parallel,
            "CP": self.context_parallel_size > 1,
            "PP": self.pipeline_model_parallel_size > 1,
            "VPP": (self.virtual_pipeline_model_parallel_size or 1) > 1,
            "EP": self.expert_model_parallel_size > 1,
            "recompute": recomputes_layers or self.lsm_recompute,
        }
        check_supported(mixer, layouts)
        check_layout(
            mixer,
            kind,
            self.layer_kinds,
            tp=self.tensor_model_parallel_size,
            cp=self.context_parallel_size,
            recomputes_layers=recomputes_layers,
        )
        if any(table.per_model for table in mixer.all_parameters()):
            self.has_cond_embedder = True
        is_handed_on = mixer.first_value is not None and self.layer_kinds.count(kind) > 1
        if is_handed_on and self.pipeline_model_parallel_size > 1:
            self.variable_seq_lengths = True  # the value rides behind the hidden states: longer messages


@dataclass(kw_only=True)
class LatentMoEConfig(LinearMoEConfig, MLATransformerConfig):
    """The same for models whose softmax layers compress keys and values (multi-head latent attention)."""

    multi_latent_attention: bool = True
    """Always true: the trainer has Megatron fill this in as a config of ordinary attention (training/arguments.py)."""

    def __post_init__(self) -> None:
        self.multi_latent_attention = True
        super().__post_init__()


def mixer_config(kind: str, config: LinearMoEConfig) -> Mixer.Config:
    """The options of the mixer ``kind`` in this model; ``ValueError`` for an unknown or impossible one."""
    assert config.kv_channels is not None
    return config_of(
        kind,
        config.mixer_options.get(kind, {}),
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        head_dim=config.kv_channels,
        layers_of_kind=max(1, config.layer_kinds.count(kind)),
        qkv_bias=config.add_qkv_bias,
        norm_eps=config.layernorm_epsilon,
    )

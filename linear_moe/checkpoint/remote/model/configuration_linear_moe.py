"""Config of an exported Linear-MoE model: which mixer or softmax attention each layer has, dense or with experts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import transformers

if int(transformers.__version__.partition(".")[0]) < 5:  # the file that is loaded first
    raise ImportError(
        f"transformers {transformers.__version__} cannot open this model\n"
        "  why: its code is for version 5, tested with 5.6.2 and 5.23.0\n"
        "  try: pip install -U transformers"
    )

from transformers import PreTrainedConfig

SOFTMAX = "softmax"
"""Kind of a softmax attention layer; every other kind is a mixer's name."""
LATENT_SIZES = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
AS_EXPORTED = "config.json as linear_moe exported it"
RUN_FILE = "linear_moe_run.json"
"""What linear_moe imports the folder from."""

Check = tuple[bool, str, str, str]
"""What must hold; and, where it does not, what is wrong, why, and what to try."""


class LinearMoeConfig(PreTrainedConfig):
    """What builds a :class:`LinearMoeForCausalLM`, written by linear_moe's export.

    Args:
        vocab_size: rows of the embedding.
        hidden_size: channels of the residual stream.
        intermediate_size: width of a dense feed-forward block; 0: layers without experts have none.
        residual_in_fp32: keep the residual stream in float32, whatever the dtype of the weights.
        num_hidden_layers: layers.
        num_attention_heads: query heads of softmax layers.
        num_key_value_heads: key and value heads of softmax layers.
        head_dim: channels of a head; with latent attention those of its rotary part.
        layer_kinds: one per layer: ``softmax``, or a name in ``mixers``.
        mixers: every option of each mixer, by name.
        rms_norm_eps: added to the mean square in every norm.
        max_position_embeddings: longest sequence of the training; nothing stops at it.
        rope_parameters: rotary embedding of softmax layers, as transformers names them.
        attention_multiplier: scale of softmax layers' logits; None: one over the root of the head's channels.
        attention_bias: bias on q, k and v of softmax layers.
        qk_norm: RMSNorm of each head's queries and keys in softmax layers.
        q_lora_rank: waist of latent attention's queries; None: none.
        kv_lora_rank: waist of its keys and values; None: no latent attention.
        qk_nope_head_dim: channels of its heads without positions.
        qk_rope_head_dim: channels with.
        v_head_dim: channels of its values.
        num_experts: experts of the layers that have them; None: none.
        num_experts_per_tok: experts that a token visits.
        moe_intermediate_size: width of an expert.
        moe_layers: whether each layer has experts; None: all do, or none.
        shared_expert_intermediate_size: width of the expert that every token visits; None: none.
        shared_expert_gate: multiply its output by a sigmoid gate of the token.
        router_score: ``softmax``, or ``sigmoid`` divided by the sum of the chosen.
        router_softmax_first: softmax over all experts, not divided by the sum of the chosen; False: over the chosen.
        router_scale: multiplies the weights of experts.
        router_groups: groups of experts, of which a token visits ``router_topk_groups``; None: none.
        router_topk_groups: see there.
        router_bias: a bias per expert that chooses, without weighing.
        router_dtype: of the router's product; None: the model's.
        initializer_range: standard deviation of new weights.
        use_cache: keep states, keys and values while generating.
        tie_word_embeddings: input and output embedding are one.

    Raises:
        ValueError: values that do not fit together.
    """

    model_type = "linear_moe"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 151936
    hidden_size: int = 1024
    intermediate_size: int = 2816
    residual_in_fp32: bool = False
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    head_dim: int = 128
    layer_kinds: list[str] | None = None
    mixers: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 131072
    rope_parameters: dict[str, Any] | None = None
    attention_multiplier: float | None = None
    attention_bias: bool = False
    qk_norm: bool = False
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    num_experts: int | None = None
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    moe_layers: list[bool] | None = None
    shared_expert_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    router_score: str = "softmax"
    router_softmax_first: bool = False
    router_scale: float | None = None
    router_groups: int | None = None
    router_topk_groups: int | None = None
    router_bias: bool = False
    router_dtype: str | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_kinds is None:
            self.layer_kinds = [SOFTMAX] * self.num_hidden_layers
        self.mixers = self.mixers or {}
        if self.moe_layers is None:
            self.moe_layers = [self.num_experts is not None] * self.num_hidden_layers
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**kwargs)
        for holds, what, why, instead in self._checks():
            if not holds:
                raise ValueError(f"{what}\n  why: {why}\n  try: {instead}")

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """And ``linear_moe_run.json``, of the folder that this was opened from: with it linear_moe trains on."""
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
        if not self.name_or_path:
            return
        source, target = Path(self.name_or_path, RUN_FILE), Path(save_directory, RUN_FILE)
        if source.is_file() and not (target.exists() and target.samefile(source)):
            shutil.copyfile(source, target)

    @property
    def is_latent(self) -> bool:
        """Softmax layers have latent attention."""
        return self.kv_lora_rank is not None

    def _checks(self) -> list[Check]:
        return [*self._checks_of_layers(), *self._checks_of_attention(), *self._checks_of_experts()]

    def _checks_of_layers(self) -> list[Check]:
        kinds, mixers, with_experts = self.layer_kinds or [], self.mixers or {}, self.moe_layers or []
        unknown = sorted(set(kinds) - {SOFTMAX} - set(mixers))
        layers = self.num_hidden_layers
        found = f"layer_kinds names {len(kinds)} of {layers} layers"
        found_experts = f"moe_layers says {len(with_experts)} of {layers} layers"
        return [
            (len(kinds) == layers, found, "one each", AS_EXPORTED),
            (not unknown, f"mixers lacks {', '.join(unknown)}", "layer_kinds names them", AS_EXPORTED),
            (len(with_experts) == layers, found_experts, "one each", AS_EXPORTED),
        ]

    def _checks_of_attention(self) -> list[Check]:
        heads, key_heads = self.num_attention_heads, self.num_key_value_heads
        latent = {name: getattr(self, name) for name in LATENT_SIZES}
        is_whole = not self.is_latent or None not in latent.values()
        return [
            (
                heads % key_heads == 0,
                f"{heads} query heads cannot share {key_heads} key heads",
                "each key head serves as many query heads",
                f"num_key_value_heads {heads}",
            ),
            (is_whole, f"latent attention with {latent}", "it has all of these sizes", AS_EXPORTED),
        ]

    def _checks_of_experts(self) -> list[Check]:
        return [
            (
                not any(self.moe_layers or []) or bool(self.num_experts and self.moe_intermediate_size),
                f"layers with experts, but num_experts {self.num_experts} of width {self.moe_intermediate_size}",
                "every layer with experts has as many, all of one width",
                AS_EXPORTED,
            ),
            (
                self.num_experts is None or 0 < self.num_experts_per_tok <= self.num_experts,
                f"num_experts_per_tok is {self.num_experts_per_tok}",
                f"a token chooses among {self.num_experts} experts",
                "a number between 1 and that",
            ),
            (
                self.router_groups is None or self._groups_fit(),
                f"router_groups {self.router_groups}, router_topk_groups {self.router_topk_groups}",
                "a group has the same number of experts, and enough are left to choose from",
                AS_EXPORTED,
            ),
            (
                self.router_score in ("softmax", "sigmoid"),
                f"router_score is {self.router_score!r}",
                "known are softmax and sigmoid",
                "softmax",
            ),
        ]

    def _groups_fit(self) -> bool:
        groups, chosen, experts = self.router_groups, self.router_topk_groups, self.num_experts
        if not groups or not chosen or not experts or experts % groups or chosen > groups:
            return False
        return self.num_experts_per_tok <= chosen * (experts // groups)

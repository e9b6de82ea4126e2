"""Linear-MoE: a decoder whose layers are linear sequence mixers or softmax attention, dense or with experts.

    x = x + mixer(norm(x))      x = x + feed_forward(norm(x)), which some models have not

Loaded by ``transformers`` with ``trust_remote_code=True``. Needs torch and transformers only; where the package
``linear_moe`` is installed, its kernels compute the recurrences. ``generate()`` keeps a state of constant size for
each linear layer. Padding, left or right, is told by ``attention_mask`` and touches nothing. Training with ``labels``
has the language-model loss only: neither experts nor memories are balanced. There is no dropout.

Letters: B rows, T tokens, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from linear_moe.checkpoint.remote.model.attention import (
    LinearMoeAttention,
    LinearMoeLatentAttention,
    LinearMoeRMSNorm,
    Rotation,
    rotation_of,
)
from linear_moe.checkpoint.remote.model.cache import LinearMoeCache
from linear_moe.checkpoint.remote.model.configuration_linear_moe import SOFTMAX, LinearMoeConfig
from linear_moe.checkpoint.remote.model.experts import (
    LinearMoeExperts,
    LinearMoeMLP,
    LinearMoeRouter,
    LinearMoeSparseBlock,
)
from linear_moe.checkpoint.remote.model.mixer_layer import (
    LinearMoeMixer,
    Tables,
    build_mixer,
    float32_names,
    initialize_tables,
)
from linear_moe.checkpoint.remote.model.padding import Padding, positions


class LinearMoeDecoderLayer(GradientCheckpointingLayer):
    """Norm, mixer or softmax attention, norm, feed-forward block; without a width for it, the first two."""

    def __init__(self, config: LinearMoeConfig, layer: int) -> None:
        super().__init__()
        assert config.layer_kinds is not None and config.moe_layers is not None
        self.kind = config.layer_kinds[layer]
        self.input_layernorm = LinearMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        if self.kind == SOFTMAX:
            attention = LinearMoeLatentAttention if config.is_latent else LinearMoeAttention
            self.self_attn = attention(config, layer)
        else:
            self.mixer = LinearMoeMixer(config, layer)
        self.mlp: nn.Module | None = None
        if config.moe_layers[layer]:
            self.mlp = LinearMoeSparseBlock(config)
        elif config.intermediate_size:
            self.mlp = LinearMoeMLP(config.hidden_size, config.intermediate_size)
        if self.mlp is not None:
            self.post_attention_layernorm = LinearMoeRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_BTD: Tensor,
        first_value: Tensor | None,
        tables: dict[str, Tensor],
        padding: Padding | None = None,
        rotation: Rotation | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: LinearMoeCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, T, D]`` to the same, and the first value for later layers of this mixer."""
        normed_BTD = self.input_layernorm(hidden_BTD)
        if self.kind == SOFTMAX:
            assert rotation is not None
            mixed_BTD, _ = self.self_attn(normed_BTD, rotation, attention_mask, past_key_values)
        else:
            mixed_BTD, first_value = self.mixer(normed_BTD, tables, first_value, padding, past_key_values)
        hidden_BTD = hidden_BTD + mixed_BTD
        if self.mlp is not None:
            hidden_BTD = hidden_BTD + self.mlp(self.post_attention_layernorm(hidden_BTD))
        return hidden_BTD, first_value


class LinearMoePreTrainedModel(PreTrainedModel):
    """Loading, saving and new weights."""

    config_class = LinearMoeConfig
    config: LinearMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LinearMoeDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": LinearMoeDecoderLayer,
        "attentions": [LinearMoeAttention, LinearMoeLatentAttention],
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, LinearMoeMixer):
            module.initialize(std)
        elif isinstance(module, Tables):
            initialize_tables(module, std)
        elif isinstance(module, LinearMoeExperts):
            module.gate_up_proj.normal_(0.0, std)
            module.down_proj.normal_(0.0, std)
        elif isinstance(module, LinearMoeRouter):
            module.weight.normal_(0.0, std)
            if module.config.router_bias:
                module.e_score_correction_bias.zero_()
        else:
            super()._init_weights(module)


class LinearMoeModel(LinearMoePreTrainedModel):
    """The decoder without its output layer."""

    def __init__(self, config: LinearMoeConfig) -> None:
        super().__init__(config)
        self._keep_in_fp32_modules_strict = float32_names(config)
        kinds = config.layer_kinds or []
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(LinearMoeDecoderLayer(config, i) for i in range(len(kinds)))
        self.norm = LinearMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        tables = {kind: Tables(build_mixer(config, kind)) for kind in dict.fromkeys(kinds) if kind != SOFTMAX}
        self.tables = nn.ModuleDict({kind: table for kind, table in tables.items() if table.tables})
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LinearMoeCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of every token, ``[B, T, D]``.

        Args:
            input_ids: ``[B, T]`` int64.
            attention_mask: ``[B, past + T]``, 0 at padding.
            position_ids: ``[B, T]`` or ``[1, T]``; unless given, places among the real tokens of a row. Without a
                mask and a cache, a document starts where they do not go on; no cache is made then.
            past_key_values: what earlier calls left.
            inputs_embeds: ``[B, T, D]`` instead of ``input_ids``.
            use_cache: return a cache.
            kwargs: of transformers, unused.

        Raises:
            ValueError: both or neither of ``input_ids`` and ``inputs_embeds``, a cache or mask of another kind.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of them")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch, columns = inputs_embeds.shape[:2]
        padding, past = Padding.of(attention_mask, batch, columns), 0
        if past_key_values is not None:
            check_cache(past_key_values)
            past = past_key_values.get_seq_length()
        if past == 0 and attention_mask is None and position_ids is not None:
            padding = Padding.of_documents(position_ids, batch)
            past_key_values, use_cache = (past_key_values, use_cache) if padding is None else (None, False)
        if use_cache and past_key_values is None:
            past_key_values = LinearMoeCache(self.config)
        options: dict[str, Any] = {"past_key_values": past_key_values, "padding": padding}
        if SOFTMAX in (self.config.layer_kinds or []):
            options |= self._for_softmax(inputs_embeds, attention_mask, position_ids, past_key_values, past)
        hidden_BTD = inputs_embeds.float() if self.config.residual_in_fp32 else inputs_embeds
        hidden_BTD = self.norm(self._run(hidden_BTD, options))
        return BaseModelOutputWithPast(last_hidden_state=hidden_BTD, past_key_values=past_key_values)

    def _for_softmax(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: LinearMoeCache | None,
        past: int,
    ) -> dict[str, Any]:
        """What layers of softmax attention take besides: where the tokens are, and which of them they see."""
        if position_ids is None:
            batch, columns = inputs_embeds.shape[:2]
            position_ids = positions(attention_mask, batch, columns, past, inputs_embeds.device)
        return {
            "rotation": rotation_of(self.config, position_ids, inputs_embeds.dtype),
            "attention_mask": create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            ),
        }

    def _run(self, hidden_BTD: Tensor, options: dict[str, Any]) -> Tensor:
        first_values: dict[str, Tensor | None] = {}
        for kind, layer in zip(self.config.layer_kinds or [], self.layers, strict=True):
            tables = self.tables[kind]() if kind in self.tables else {}
            hidden_BTD, first_values[kind] = layer(hidden_BTD, first_values.get(kind), tables, **options)
        return hidden_BTD


class LinearMoeForCausalLM(LinearMoePreTrainedModel, GenerationMixin):
    """The decoder and its output layer."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LinearMoeConfig) -> None:
        super().__init__(config)
        self.model = LinearMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LinearMoeCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[B, T, V]``; arguments as of :meth:`LinearMoeModel.forward`, and

        Args:
            labels: ``[B, T]`` int64, the tokens themselves, -100 where there is no loss.
            logits_to_keep: logits of so many last tokens, or of these; 0: all.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """The cache of ``generate()``; transformers' own would not know the states."""
        asked = generation_config.cache_implementation
        if asked not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation {asked!r} does not hold the states of linear layers\n"
                "  why: they have neither keys nor values, and their size is constant anyway\n"
                "  try: no cache_implementation"
            )
        given = model_kwargs.get("past_key_values")
        if given is not None:
            check_cache(given)
            given._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = LinearMoeCache(self.config)


def check_cache(cache: Cache) -> None:
    """Refuse what is not a :class:`LinearMoeCache`; ``ValueError``."""
    if not isinstance(cache, LinearMoeCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}\n"
            "  why: linear layers keep a state instead of keys and values, which it cannot hold\n"
            "  try: none, or the past_key_values that an earlier call returned"
        )


__all__ = ["LinearMoeCache", "LinearMoeConfig", "LinearMoeForCausalLM", "LinearMoeModel"]

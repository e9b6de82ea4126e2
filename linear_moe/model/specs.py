"""From the layer pattern to Megatron's layer specs: the only place that knows them.

Every layer is a stock ``TransformerLayer``; its ``self_attention`` is a mixer or softmax attention, its ``mlp`` dense,
a mixture of experts or nothing. The pattern is for the whole model; each pipeline stage takes its slice.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType, LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from linear_moe.model.backend import LinearMoEBackend, make_backend
from linear_moe.model.config import LinearMoEConfig
from linear_moe.model.group_router import GroupLimitedRouter
from linear_moe.model.latent_attention import LatentAttention
from linear_moe.model.local_dispatcher import MoE
from linear_moe.model.mixer_layer import MixerLayer
from linear_moe.model.pattern import SOFTMAX
from linear_moe.model.router import Router
from linear_moe.model.softmax_attention import SoftmaxAttention


def block_spec(
    config: LinearMoEConfig, *, pp_rank: int, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of one (virtual) pipeline stage and the final norm."""
    backend = make_backend(config.transformer_impl, sequential_experts=config.sequential_experts)
    moe = moe_layers(config)
    return TransformerBlockSubmodules(
        layer_specs=[
            layer_spec(config, backend, config.layer_kinds[i], moe[i])
            for i in stage_layers(config, pp_rank=pp_rank, vp_stage=vp_stage)
        ],
        layer_norm=backend.layer_norm(rms_norm=config.normalization == "RMSNorm", for_qk=False),
    )


def stage_layers(config: LinearMoEConfig, *, pp_rank: int, vp_stage: int | None = None) -> list[int]:
    """Global indices, from 0, of the layers of a stage."""
    if config.pipeline_model_parallel_layout is not None:
        return config.pipeline_model_parallel_layout.get_layer_id_list(
            layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank
        )
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return list(range(offset, offset + count))


def moe_layers(config: LinearMoEConfig) -> list[bool]:
    """Whether each layer of the model has experts."""
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    freq = config.moe_layer_freq
    if isinstance(freq, int):
        return [i % freq == 0 for i in range(config.num_layers)]
    assert len(freq) == config.num_layers, "moe_layer_freq must name every layer"
    return [bool(is_moe) for is_moe in freq]


def layer_spec(config: LinearMoEConfig, backend: LinearMoEBackend, kind: str, is_moe: bool) -> ModuleSpec:
    """One transformer layer: norm, mixer or softmax attention, norm, experts or dense feed-forward.

    With a feed-forward width of 0, layers without experts end after the mixer: Megatron's default modules for the other
    half of a layer do nothing.
    """
    assert not backend.fuse_layernorm_and_linear(), "norms are modules of their own here: keys stay the same"
    has_residual = not _recomputes_norms(config)
    norm = backend.layer_norm(rms_norm=config.normalization == "RMSNorm", has_residual=has_residual)
    token_mixer = softmax_spec(config, backend) if kind == SOFTMAX else mixer_spec(kind)
    submodules = TransformerLayerSubmodules(
        input_layernorm=norm, self_attention=token_mixer, self_attn_bda=get_bias_dropout_add
    )
    if is_moe or config.ffn_hidden_size:
        submodules.pre_mlp_layernorm = norm
        submodules.mlp = _feed_forward(config, backend, is_moe)
        submodules.mlp_bda = get_bias_dropout_add
    return ModuleSpec(module=TransformerLayer, submodules=submodules)


def _recomputes_norms(config: LinearMoEConfig) -> bool:
    """Megatron then frees all that a norm gives, which its input must not be."""
    return config.recompute_granularity == "selective" and "layernorm" in (config.recompute_modules or ())


def _feed_forward(config: LinearMoEConfig, backend: LinearMoEBackend, is_moe: bool) -> Any:
    mlp: Any = get_mlp_module_spec_for_backend(
        backend,
        num_experts=config.num_moe_experts if is_moe else None,
        moe_grouped_gemm=is_moe and not config.sequential_experts,
    )
    if is_moe:
        mlp = partial(MoE, **mlp.keywords)
        is_grouped = config.moe_router_group_topk is not None
        mlp.keywords["submodules"].router = GroupLimitedRouter if is_grouped else Router
    return mlp


def mixer_spec(kind: str) -> ModuleSpec:
    """A mixer in the attention slot."""
    # multi-token prediction reads attn_mask_type from the spec of the layer it copies
    return ModuleSpec(module=MixerLayer, params={"mixer": kind, "attn_mask_type": AttnMaskType.causal})


def softmax_spec(config: LinearMoEConfig, backend: LinearMoEBackend) -> ModuleSpec:
    """Softmax attention with the backend's linear layers and core attention."""
    if config.multi_latent_attention:
        return latent_spec(config, backend)
    qk_norm = None
    if config.qk_layernorm:
        qk_norm = backend.layer_norm(rms_norm=config.normalization == "RMSNorm", for_qk=True)
    return ModuleSpec(
        module=SoftmaxAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.biased_column_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=qk_norm or IdentityOp,
            k_layernorm=qk_norm or IdentityOp,
        ),
    )


def latent_spec(config: LinearMoEConfig, backend: LinearMoEBackend) -> ModuleSpec:
    """The same for multi-head latent attention; ``--qk-layernorm`` norms what is compressed."""
    column = backend.column_parallel_linear()
    norm: Any = None
    if config.qk_layernorm:
        norm = backend.layer_norm(rms_norm=config.normalization == "RMSNorm", for_qk=True)
    return ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=column,
            linear_q_down_proj=column,
            linear_q_up_proj=column,
            linear_kv_down_proj=column,
            linear_kv_up_proj=column,
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=norm or IdentityOp,
            kv_layernorm=norm or IdentityOp,
        ),
    )

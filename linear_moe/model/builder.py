"""How Megatron builds a Linear-MoE model: its GPTModel with our layers, found by name from the model config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec_for_backend
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.vocab_utils import calculate_padded_vocab_size

from linear_moe.model.backend import make_backend
from linear_moe.model.config import LinearMoEConfig
from linear_moe.model.sharing import share
from linear_moe.model.specs import block_spec, layer_spec, moe_layers, stage_layers


@dataclass(kw_only=True)
class LinearMoEModelConfig(GPTModelConfig):
    """Megatron's GPT model config, built by :class:`LinearMoEBuilder`."""

    builder: ClassVar[str] = "linear_moe.model.builder.LinearMoEBuilder"
    transformer: LinearMoEConfig


class LinearMoEBuilder(GPTModelBuilder):
    """Builds the stages of a GPTModel from the layer pattern."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """One (virtual) pipeline stage."""
        model_config = self._model_config
        config = model_config.transformer
        vp_size = config.virtual_pipeline_model_parallel_size
        if pre_process is None:
            pre_process = is_vp_first_stage(vp_stage, vp_size) and is_pp_first_stage(pg_collection.pp)
        if post_process is None:
            post_process = is_vp_last_stage(vp_stage, vp_size) and is_pp_last_stage(pg_collection.pp)
        pp_rank = pg_collection.pp.rank()
        model = GPTModel(
            config=config,
            transformer_layer_spec=block_spec(config, pp_rank=pp_rank, vp_stage=vp_stage),
            mtp_block_spec=_mtp_spec(config, pp_rank, vp_stage),
            vocab_size=padded_vocab_size(model_config),
            max_sequence_length=model_config.seq_length,
            fp16_lm_cross_entropy=model_config.fp16_lm_cross_entropy,
            parallel_output=model_config.parallel_output,
            share_embeddings_and_output_weights=model_config.share_embeddings_and_output_weights,
            position_embedding_type=model_config.position_embedding_type,
            rotary_percent=model_config.rotary_percent,
            rotary_base=model_config.rotary_base,
            rope_scaling=model_config.rope_scaling,
            rope_scaling_factor=model_config.rope_scaling_factor,
            seq_len_interpolation_factor=model_config.seq_len_interpolation_factor,
            scatter_embedding_sequence_parallel=model_config.scatter_embedding_sequence_parallel,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        share(model, stage_layers(config, pp_rank=pp_rank, vp_stage=vp_stage), pg_collection, vp_stage)
        return model


def padded_vocab_size(model_config: GPTModelConfig) -> int:
    """Rows of the embedding: the vocabulary, padded so that every layout divides it."""
    assert model_config.vocab_size is not None
    if not model_config.should_pad_vocab:
        return model_config.vocab_size
    return calculate_padded_vocab_size(
        model_config.vocab_size,
        model_config.make_vocab_size_divisible_by,
        model_config.transformer.tensor_model_parallel_size,
    )


def _mtp_spec(config: LinearMoEConfig, pp_rank: int, vp_stage: int | None) -> Any:
    """Multi-token prediction layers of the last decoder layer's kind (the stock builder takes stock attention)."""
    if config.mtp_num_layers is None:
        return None
    backend = make_backend(config.transformer_impl, sequential_experts=config.sequential_experts)
    last = layer_spec(config, backend, config.layer_kinds[-1], moe_layers(config)[-1])
    norm = backend.layer_norm(rms_norm=config.normalization == "RMSNorm", for_qk=False)
    block = TransformerBlockSubmodules(layer_specs=[last], layer_norm=norm)
    return get_gpt_mtp_block_spec_for_backend(config, block, backend, vp_stage=vp_stage, pp_rank=pp_rank)

"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): Megatron's layer, corrected where it fails.

    c_t = norm(W_c x_t)                     compressed key and value of a token, all heads together
    k_t = [W_k c_t, rope(W_r x_t)]          v_t = W_v c_t            the rotary part is one key for all heads

Documents packed per sequence: Megatron drops the batch dimension of the projections whenever documents are packed,
which suits one long row (``thd``) and breaks a regular batch of one sequence: rotary embeddings then broadcast over
tokens. Positions are not reset in a regular batch, so its projections need not know about documents; only core
attention does.

Tensor parallelism: the compressed tensors are gathered from all ranks, and every rank's heads read the one rotary key.
Megatron gives each rank the gradient of its own heads alone, and the others' is lost.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor


class LatentAttention(MLASelfAttention):
    """Megatron's layer, except that its projections see regular batches as such, and gradients of all heads."""

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        inference_context: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        """Query, key and value ``[T, B, H, .]`` and the two compressed tensors, as Megatron returns them."""
        is_regular = packed_seq_params is not None and packed_seq_params.qkv_format == "sbhd"
        return super().get_query_key_value_tensors(
            hidden_states,
            key_value_states,
            position_ids,
            None if is_regular else packed_seq_params,
            inference_context,
            **kwargs,
        )

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        """What the spec says: Megatron wants a norm of queries as well, which DeepSeek-V2-Lite does not compress."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Compressed queries, and compressed keys and values with the rotary key in one: the latter of full width.

        Under sequence parallelism they are this rank's tokens: what follows then gathers the rotary key of all tokens,
        and its gradient is summed over ranks there. Without it, here.
        """
        q_compressed, kv = super()._qkv_down_projection(hidden_states)
        rank, rope = self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim
        if kv.shape[-1] == rank + rope:
            return q_compressed, kv
        kv = gather_from_tensor_model_parallel_region(kv)
        if self.config.sequence_parallel:
            return q_compressed, scatter_to_sequence_parallel_region(kv)
        kv_compressed, k_rotary = kv.split([rank, rope], dim=-1)
        return q_compressed, torch.cat(
            [kv_compressed, copy_to_tensor_model_parallel_region(k_rotary)], dim=-1
        )

"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) that takes documents packed per sequence.

Megatron's own drops the batch dimension of its projections whenever documents are packed, which suits one long row
(``thd``) and breaks a regular batch of one sequence: rotary embeddings then broadcast over tokens. Positions are not
reset in a regular batch, so its projections need not know about documents; only core attention does.
"""

from __future__ import annotations

from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor


class LatentAttention(MLASelfAttention):
    """Megatron's layer, except that its projections see regular batches as such."""

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

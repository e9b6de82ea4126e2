"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): Megatron's layer, corrected where it fails.

    c_t = norm(W_c x_t)                     compressed key and value of a token, all heads together
    k_t = [W_k c_t, rope(W_r x_t)]          v_t = W_v c_t            the rotary part is one key for all heads

Documents packed per sequence: Megatron drops the batch dimension of the projections whenever documents are packed,
which suits one long row (``thd``) and breaks a regular batch of one sequence: rotary embeddings then broadcast over
tokens. Positions are not reset in a regular batch, so its projections need not know about documents; only core
attention does.

Tensor parallelism: the compressed tensors are gathered from all ranks, and every rank's heads read the one rotary key.
Megatron gives each rank the gradient of its own heads alone, and the others' is lost.

Decoding keeps ``c_t`` and the rotary key, and nothing per head. A step never makes the keys of the cache: it moves
``W_k`` to the query and ``W_v`` behind the weighted sum, so that all heads attend to the one compressed row (section
2.1.2). Reading a prompt, of many queries, makes the row's keys and values once for all of them, which is cheaper.

Letters: B rows, T tokens of a call, S capacity of the cache, H heads, C compressed width, R rotary width, X = C + R,
N key width without positions, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor

from linear_moe.model.decoding import DecodingContext
from linear_moe.model.softmax_attention import attend_one


class LatentAttention(MLASelfAttention):
    """Megatron's layer, corrected, with a cache of its own under a :class:`DecodingContext`."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``[T, B, D]`` to the same and the bias that the caller adds (Megatron's contract)."""
        if not isinstance(inference_context, DecodingContext):
            return super().forward(
                hidden_states, attention_mask, key_value_states, inference_context, *args, **kwargs
            )
        context = inference_context
        q_TBHN, q_TBHR, x_TBX = self._decoding_projections(hidden_states, context)
        (x_B1SX,) = context.write(self.layer_number, x_TBX[:, :, None])
        if context.reading is not None:
            return self.linear_proj(self._attend_rows(context, torch.cat([q_TBHN, q_TBHR], -1), x_B1SX))
        weight_HnC = self.linear_kv_up_proj.weight.unflatten(0, (q_TBHN.shape[2], -1))
        k_HNC, v_HVC = weight_HnC.split([self.config.qk_head_dim, self.config.v_head_dim], dim=1)
        q_BHX = torch.cat([torch.einsum("bhn,hnc->bhc", q_TBHN[0], k_HNC), q_TBHR[0]], -1)
        c_B1SC = x_B1SX[..., : self.config.kv_lora_rank]
        sum_BHC = attend_one(q_BHX, x_B1SX, c_B1SC, context.allowed_B11S, self.softmax_scale)
        out_BHV = torch.einsum("bhc,hvc->bhv", sum_BHC.unflatten(1, (q_BHX.shape[1], -1)), v_HVC)
        return self.linear_proj(out_BHV.flatten(1)[None])

    def _decoding_projections(
        self, hidden_states: Tensor, context: DecodingContext
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries without and with positions ``[T, B, H, .]``, and what is kept of each token ``[T, B, X]``."""
        config = self.config
        q_compressed, kv = self._qkv_down_projection(hidden_states)
        if config.q_lora_rank is None:
            q, _ = self.linear_q_proj(q_compressed)
        else:
            q, _ = self.linear_q_up_proj(self.q_layernorm(q_compressed))
        q = q.unflatten(-1, (-1, config.qk_head_dim + config.qk_pos_emb_head_dim))
        q_TBHN, q_TBHR = q.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
        c_TBC, r_TBR = kv.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1)
        table = self.rotary_pos_emb(context.max_sequence_length)
        freqs_S11R, mscale = table if isinstance(table, tuple) else (table, 1.0)
        freqs_TB1R = context.hold(self.layer_number, freqs_S11R)[:, 0][context.positions_TB]
        q_TBHR, r_TB1R = (
            apply_rotary_pos_emb(
                x,
                freqs_TB1R,
                config=config,
                mscale=mscale,
                cp_group=self.pg_collection.cp,
                mla_rotary_interleaved=True,
            )
            for x in (q_TBHR, r_TBR[:, :, None])
        )
        return q_TBHN, q_TBHR, torch.cat([self.kv_layernorm(c_TBC), r_TB1R[:, :, 0]], -1)

    def _attend_rows(self, context: DecodingContext, q_TBHK: Tensor, x_B1SX: Tensor) -> Tensor:
        """``[T, B, H * V]``: the tokens of every row attend to all that the row has read, themselves included."""
        reading, config = context.reading, self.config
        assert reading is not None
        outputs = []
        for row, (start, count) in enumerate(zip(reading.starts, reading.counts, strict=True)):
            if count == 0:
                continue
            c_S1C, r_S1R = x_B1SX[row, 0, : start + count, None].split(
                [config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1
            )
            kv, _ = self.linear_kv_up_proj(c_S1C)
            k_S1HN, v_S1HV = kv.unflatten(-1, (q_TBHK.shape[2], -1)).split(
                [config.qk_head_dim, config.v_head_dim], dim=-1
            )
            k_S1HK = torch.cat([k_S1HN, r_S1R[:, :, None].expand(-1, -1, k_S1HN.shape[2], -1)], -1)
            outputs.append(self.core_attention(reading.of_row(q_TBHK, row), k_S1HK, v_S1HV, None))
        return reading.join(outputs)

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
        """The modules of the spec; Megatron insists on a query norm, and DeepSeek-V2-Lite's queries have none."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Compressed queries; compressed keys and values with the rotary key, at full width on every rank.

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

"""Softmax attention of a layer, while training Megatron's, while decoding ours: rows of any length, keys kept rotated.

    o_t = sum_{j <= t} softmax_j(scale * q_t^T k_j) v_j        of one row, at its own positions

Reading a prompt attends row by row, so that no row's result depends on another's and nothing is masked or padded. A
step is one call of PyTorch's fused attention for all rows and heads: the query heads that share a key head are the
rows of one product, and a mask of one byte per cached token ends each row.

Letters: B rows, T tokens of a call, S capacity of the cache, H query heads, G key heads, K key dim, V value dim.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor
from torch.nn import functional as F

from linear_moe.model.decoding import DecodingContext


class SoftmaxAttention(SelfAttention):
    """Megatron's self attention, with a cache of its own under a :class:`DecodingContext`."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``[T, B, D]`` to the same and the bias that the caller adds (Megatron's contract)."""
        if not isinstance(inference_context, DecodingContext):
            return super().forward(
                hidden_states,
                attention_mask,
                key_value_states,
                inference_context,
                rotary_pos_emb,
                *args,
                **kwargs,
            )
        context, gate = inference_context, None
        projected = self.get_query_key_value_tensors(
            hidden_states, None, output_gate=self.config.attention_output_gate
        )
        q_TBHK, k_TBGK, v_TBGV = projected[:3]
        if self.config.attention_output_gate:
            gate = projected[3]
        if rotary_pos_emb is not None and not self._has_no_rope():
            freqs = rotary_pos_emb[0] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb
            freqs_TB1K = context.hold(self.layer_number, freqs)[:, 0][context.positions_TB]
            q_TBHK, k_TBGK = (self._rotate(x, freqs_TB1K) for x in (q_TBHK, k_TBGK))
        k_BGSK, v_BGSV = context.write(self.layer_number, k_TBGK, v_TBGV)
        if context.reading is None:
            out_TBC = attend_one(q_TBHK[0], k_BGSK, v_BGSV, context.allowed_B11S, self._scale())[None]
        else:
            out_TBC = self._attend_rows(context, q_TBHK, k_BGSK, v_BGSV)
        if gate is not None:
            out_TBC = self._apply_output_gate(out_TBC, gate)
        return self.linear_proj(out_TBC)

    def _attend_rows(
        self, context: DecodingContext, q_TBHK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor
    ) -> Tensor:
        """``[T, B, H * V]``: the tokens of every row to what the row has read, themselves included."""
        reading = context.reading
        assert reading is not None
        outputs = []
        for row, (start, count) in enumerate(zip(reading.starts, reading.counts, strict=True)):
            if count:
                kept = (x[row, :, : start + count].transpose(0, 1).unsqueeze(1) for x in (k_BGSK, v_BGSV))
                outputs.append(self.core_attention(reading.of_row(q_TBHK, row), *kept, None))
        return reading.join(outputs)

    def _rotate(self, x_TBHK: Tensor, freqs_TB1K: Tensor) -> Tensor:
        return apply_rotary_pos_emb(
            x_TBHK,
            freqs_TB1K,
            config=self.config,
            mscale=self._yarn_concentration_factor,
            cp_group=self.pg_collection.cp,
        )

    def _has_no_rope(self) -> bool:
        pattern = self.config.no_rope_freq
        return bool(pattern and pattern[self.layer_number - 1])

    def _scale(self) -> float | None:
        scale: float | None = self.core_attention.softmax_scale
        return scale


def attend_one(
    q_BHK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor, allowed_B11S: Tensor | None, scale: float | None
) -> Tensor:
    """One token of every row to the cached ones that ``allowed_B11S`` says: ``[B, H * V]``."""
    groups = k_BGSK.shape[1]
    q_BGLK = q_BHK.unflatten(1, (groups, -1))
    out_BGLV = F.scaled_dot_product_attention(q_BGLK, k_BGSK, v_BGSV, attn_mask=allowed_B11S, scale=scale)
    return torch.flatten(out_BGLV, 1)

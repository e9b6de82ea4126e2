"""Softmax attention of a layer, while training Megatron's, while decoding ours: rows of any length, keys kept rotated.

    o_t = sum_{j <= t} softmax_j(scale * q_t^T k_j) v_j        of one row, at its own positions

Reading a prompt attends row by row, so that no row's result depends on another's and nothing is masked or padded. A
step is one call of PyTorch's fused attention for all rows and heads: the query heads that share a key head are the
rows of one product, and a mask of one byte per cached token ends each row.

Positions: Megatron turns queries and keys one after the other, each in ten passes, or by Transformer Engine's kernel
(``apply_rope_fusion``). Where there is a fused kernel of ours, it turns both at once, in training and decoding, and
Megatron is told that there are no positions left. Its own path stays for ``thd``, where documents lie end to end and
each has its own positions, and for channels turned in neighbouring pairs.

Letters: B rows, T tokens of a call, S capacity of the cache, H query heads, G key heads, K key dim, V value dim.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor
from torch.nn import functional as F

from linear_moe.kernels import dispatch, rotate_heads
from linear_moe.model.decoding import DecodingContext


class OfRows(tuple[Tensor, Tensor]):
    """Megatron's pair of rotary tables (of queries, of keys), the same one twice, for tokens in rows of a batch.

    Its type tells :class:`SoftmaxAttention` that it may rotate both itself.
    """


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
            packed = kwargs.get("packed_seq_params")
            if isinstance(rotary_pos_emb, Tensor) and (packed is None or packed.qkv_format == "sbhd"):
                rotary_pos_emb = OfRows((rotary_pos_emb, rotary_pos_emb))
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
            q_TBHK, k_TBGK = self._rotate(q_TBHK, k_TBGK, freqs_TB1K)
        k_BGSK, v_BGSV = context.write(self.layer_number, k_TBGK, v_TBGV)
        if context.reading is None:
            out_TBC = attend_one(q_TBHK[0], k_BGSK, v_BGSV, context.allowed_B11S, self._scale())[None]
        else:
            out_TBC = self._attend_rows(context, q_TBHK, k_BGSK, v_BGSV)
        if gate is not None:
            out_TBC = gated(out_TBC, gate)
        return self.linear_proj(out_TBC)

    def _attend_rows(
        self, context: DecodingContext, q_TBHK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor
    ) -> Tensor:
        """``[T, B, H * V]``: the tokens of every row attend to all that the row has read, themselves included."""
        reading = context.reading
        assert reading is not None
        outputs = []
        for row, (start, count) in enumerate(zip(reading.starts, reading.counts, strict=True)):
            if count:
                kept = (x[row, :, : start + count].transpose(0, 1).unsqueeze(1) for x in (k_BGSK, v_BGSV))
                outputs.append(self.core_attention(reading.of_row(q_TBHK, row), *kept, None))
        return reading.join(outputs)

    def _adjust_key_value_for_inference(
        self,
        inference_context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_pos_emb: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Megatron's ``forward`` calls it before it rotates queries and keys: where a fused kernel does, it does here.

        Megatron gets no table back then, and rotates nothing.
        """
        is_ours = inference_context is None and isinstance(rotary_pos_emb, OfRows)
        if is_ours and self._turns_both(query):
            query, key = self._rotate(query, key, rotary_pos_emb[0])
            rotary_pos_emb = None
        return super()._adjust_key_value_for_inference(
            inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
        )

    def _turns_both(self, x: Tensor) -> bool:
        return not (self.config.apply_rope_fusion or self.config.rotary_interleaved) and _has_fused_rotary(x)

    def _rotate(self, q_TBHK: Tensor, k_TBGK: Tensor, freqs_TB1R: Tensor) -> tuple[Tensor, ...]:
        """By the angles of a table of one row or of all; its second half repeats the first."""
        scale = self._yarn_concentration_factor
        if self._turns_both(q_TBHK):
            angles_TBR = freqs_TB1R[:, :, 0, : freqs_TB1R.shape[-1] // 2].expand(*q_TBHK.shape[:2], -1)
            q_BTHK, k_BTGK, angles_BTR = (x.transpose(0, 1) for x in (q_TBHK, k_TBGK, angles_TBR))
            turned = rotate_heads(q_BTHK, k_BTGK, angles_BTR, scale=scale)
            return tuple(x.transpose(0, 1) for x in turned)
        options = dict(config=self.config, mscale=scale, cp_group=self.pg_collection.cp)
        return tuple(apply_rotary_pos_emb(x, freqs_TB1R, **options) for x in (q_TBHK, k_TBGK))

    def _has_no_rope(self) -> bool:
        pattern = self.config.no_rope_freq
        return bool(pattern and pattern[self.layer_number - 1])

    def _scale(self) -> float | None:
        scale: float | None = self.core_attention.softmax_scale
        return scale


def _has_fused_rotary(x: Tensor) -> bool:
    """Whether a fused kernel rotates heads here; otherwise Megatron's own code does."""
    return dispatch.pick("rotate_heads", x.device, x.dtype).name == "triton"


def attend_one(
    q_BHK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor, allowed_B11S: Tensor | None, scale: float | None
) -> Tensor:
    """One token of every row attends to its cached tokens where ``allowed_B11S`` is true: ``[B, H * V]``."""
    groups = k_BGSK.shape[1]
    q_BGLK = q_BHK.unflatten(1, (groups, -1))
    out_BGLV = F.scaled_dot_product_attention(q_BGLK, k_BGSK, v_BGSV, attn_mask=allowed_B11S, scale=scale)
    return torch.flatten(out_BGLV, 1)


def gated(out_TBC: Tensor, gate_TBHK: Tensor) -> Tensor:
    """The output gate as Megatron computes it; its own is compiled anew for every shape, seconds each in decoding."""
    weight_TBC = torch.sigmoid(gate_TBHK.float()).reshape(out_TBC.shape)
    return (out_TBC * weight_TBC).to(out_TBC.dtype)

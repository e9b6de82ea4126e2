"""Softmax attention without Transformer Engine, for the softmax layers of a hybrid model.

    o_t = sum_{j <= t, same document} softmax_j(scale * q_t^T k_j) v_j

Runs on PyTorch's fused attention. Under context parallelism K and V are all-gathered and put in sequence order, and
each of the rank's chunks attends to the keys up to its own end (LASP-2H, arXiv:2502.07563 section 3.4); the gradient
comes back through one reduce-scatter. The gathered K and V live until the backward pass unless attention is recomputed
(``--recompute-granularity selective``).

Letters: B batch, T local query tokens, S key tokens, L tokens of a chunk, H query heads, G key heads (G divides H),
K key dim, V value dim. Megatron keeps time first: ``[T, B, H, K]``.
"""

from __future__ import annotations

import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from linear_moe.model.sequence import layout_of
from linear_moe.parallel.collectives import all_gather
from linear_moe.parallel.layout import SequenceLayout


class CoreAttention(MegatronModule):
    """Causal softmax attention in the place of Megatron's ``core_attention``; it has no parameters.

    Args:
        softmax_scale: factor on ``q^T k``; ``None`` means ``1 / sqrt(K)``.
        k_channels, v_channels: what multi-latent attention passes; head sizes are read from the tensors.

    Raises:
        ValueError: the configuration asks for a kind of attention that is not here.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str = "self",
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        _refuse_unsupported(config, layer_number, attn_mask_type, attention_type)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.cp_group = pg_collection.cp
        self.softmax_scale = softmax_scale
        self.attention_dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[T, B, H, K]``, or ``[T, H, K]`` in ``thd`` format.
            key: ``[S, B, G, K]``; longer than ``query`` while decoding, when the query tokens are the last ones.
            value: ``[S, B, G, V]``.
            attention_mask: bool, broadcasts to ``[B, 1, T, S]``, true where a query may *not* look, on top of
                causality (left padding). A query that may look nowhere gives zeros.
            attn_mask_type: ignored: decoding switches it off in Megatron, and causality holds there too.
            attention_bias: must be ``None``.
            packed_seq_params: document boundaries, see :func:`linear_moe.model.sequence.layout_of`.

        Returns:
            ``[T, B, H * V]``, or ``[T, H * V]`` in ``thd`` format.
        """
        if attention_bias is not None:
            raise _unsupported("an attention bias", "pass no attention_bias")
        if query.ndim == 3:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            return self._attend(query, key, value, attention_mask, packed_seq_params).squeeze(1)
        return self._attend(query, key, value, attention_mask, packed_seq_params)

    def _attend(
        self,
        q_TBHK: Tensor,
        k_SBGK: Tensor,
        v_SBGV: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None,
    ) -> Tensor:
        is_decoding = q_TBHK.shape[0] != k_SBGK.shape[0]
        cp_size = self.cp_group.size()
        if cp_size > 1 and (is_decoding or attention_mask is not None):
            raise _unsupported(
                "decoding or an attention mask tensor under context parallelism",
                "use context parallel size 1, or document boundaries (packed sequences) in place of the mask",
            )
        if is_decoding and packed_seq_params is not None:
            raise _unsupported("decoding packed sequences", "decode one sequence per batch row")
        T, B = q_TBHK.shape[:2]
        layout = layout_of(packed_seq_params, batch=B, local_length=T, cp_group=self.cp_group)
        if cp_size > 1:
            k_SBGK, v_SBGV = self._gather(k_SBGK, v_SBGV, layout)
        outputs = []
        with self._dropout_rng():
            for c, q_LBHK in zip(layout.local_chunks, q_TBHK.chunk(layout.chunks_per_rank), strict=True):
                end = k_SBGK.shape[0] if cp_size == 1 else (c + 1) * layout.chunk_length
                outputs.append(self._chunk(q_LBHK, k_SBGK[:end], v_SBGV[:end], layout, attention_mask))
        return (torch.cat(outputs) if len(outputs) > 1 else outputs[0]).contiguous()

    @property
    def _dropout(self) -> float:
        return self.attention_dropout if self.training else 0.0

    def _dropout_rng(self) -> AbstractContextManager:
        """Other dropout on every tensor-parallel rank; under sequence parallelism Megatron has switched already."""
        if self._dropout == 0 or self.config.sequence_parallel:
            return nullcontext()
        return tensor_parallel.get_cuda_rng_tracker().fork()

    def _gather(self, k_TBGK: Tensor, v_TBGV: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole sequences, in order: ``[S, B, G, .]``, by one all-gather."""
        both_TBGX = torch.cat([k_TBGK, v_TBGV], dim=-1)
        gathered_RTBGX = all_gather(both_TBGX, self.cp_group)
        chunks_R1JLBGX = gathered_RTBGX.unflatten(1, (1, layout.chunks_per_rank, layout.chunk_length))
        whole_SBGX = layout.natural_order(chunks_R1JLBGX).flatten(0, 2)
        k_SBGK, v_SBGV = whole_SBGX.split([k_TBGK.shape[-1], v_TBGV.shape[-1]], dim=-1)
        return k_SBGK, v_SBGV

    def _chunk(self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, mask: Tensor | None) -> Tensor:
        """The last ``L`` tokens ``q [L, B, H, K]`` of ``k [E, B, G, K]`` and ``v [E, B, G, V]``: ``[L, B, H * V]``."""
        scale = self.softmax_scale if self.softmax_scale is not None else 1.0 / math.sqrt(q.shape[-1])
        key_dim, value_dim = q.shape[-1], v.shape[-1]
        has_flash_shape = key_dim % 8 == 0 and value_dim <= key_dim <= 256
        fused = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and has_flash_shape
        if fused and value_dim < key_dim:
            # Flash attention wants one head size; zeros in V cost less than the slower kernels (MLA: 128 to 192).
            v = F.pad(v, (0, key_dim - value_dim))
        if layout.is_packed and fused and mask is None and self._dropout == 0:
            out_LBHV = _documents(q, k, v, layout, scale)
        else:
            out_LBHV = self._sdpa(q, k, v, layout, mask, scale)
        return out_LBHV[..., :value_dim].flatten(2)

    def _sdpa(
        self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, mask: Tensor | None, scale: float
    ) -> Tensor:
        L, E = q.shape[0], k.shape[0]
        is_causal = False
        bias: Tensor | None = None
        if layout.is_packed or mask is not None:
            bias = _allowed(L, E, layout, mask, q.device)
            _warn_of_mask_once(q.is_cuda)
        elif L == E:
            is_causal = True
        elif L > 1:  # a single query, the last token, may look everywhere
            bias = _lower_right(L, E, layout, q.device)
        q_BHLK, k_BGEK, v_BGEV = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        with _kernels(q.is_cuda, self.training and bias is None):
            out_BHLV = F.scaled_dot_product_attention(
                q_BHLK,
                k_BGEK,
                v_BGEV,
                attn_mask=bias,
                is_causal=is_causal,
                dropout_p=self._dropout,
                scale=scale,
                enable_gqa=q.shape[2] != k.shape[2],
            )
        return out_BHLV.permute(2, 0, 1, 3)


def _kernels(is_cuda: bool, with_cudnn: bool) -> AbstractContextManager:
    """Which kernels may run: torch 2.11 prefers cuDNN's on Hopper, which is for training without a mask here.

    With one, the gradient of queries may be NaN (github.com/pytorch/pytorch/issues/196678). And it plans anew for every
    length, some 30 ms of the host each, while prompts have all lengths.
    """
    if not is_cuda or with_cudnn:
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _documents(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout, scale: float) -> Tensor:
    """Packed documents without a mask in memory: every (sequence, document) is one row of a ragged batch.

    Queries are the last ``L`` tokens of the ``E`` keys. A document that ends before them has keys and no query, one
    that begins after them neither; causality is aligned at the ends, so one cut by a chunk is no special case.
    """
    assert layout.cu_seqlens is not None
    L, B = q.shape[:2]
    E = k.shape[0]
    ends_BN1 = layout.cu_seqlens.long()

    def boundaries(start: int, length: int) -> Tensor:
        lengths_BN = (ends_BN1 - start).clamp(0, length).diff(dim=1)
        return F.pad(lengths_BN.flatten().cumsum(0), (1, 0)).int()

    q_row, k_row, v_row = (x.transpose(0, 1).flatten(0, 1) for x in (q, k, v))
    out = varlen_attn(
        q_row,
        k_row,
        v_row,
        cu_seq_q=boundaries(E - L, L),
        cu_seq_k=boundaries(0, E),
        max_q=L,
        max_k=E,
        scale=scale,
        window_size=(-1, 0),
    )
    assert isinstance(out, Tensor)
    return out.unflatten(0, (B, L)).transpose(0, 1)


def _lower_right(L: int, E: int, layout: SequenceLayout, device: torch.device) -> Tensor:
    """Causality of the last ``L`` of ``E`` tokens: on CUDA a marker that flash attention understands, else a mask."""
    if device.type != "cuda":
        return _allowed(L, E, layout, None, device)
    from torch.nn.attention.bias import (
        causal_lower_right,
    )  # imports the compiler: not on machines without CUDA

    return causal_lower_right(L, E)


def _allowed(L: int, E: int, layout: SequenceLayout, mask: Tensor | None, device: torch.device) -> Tensor:
    """Where each of the last ``L`` of ``E`` tokens may look, bool, broadcasts to ``[B, 1, L, E]``."""
    allowed = torch.ones(L, E, dtype=torch.bool, device=device).tril(E - L)[None, None]
    ids_BS = layout.document_ids_BS
    if ids_BS is not None:
        allowed = allowed & (ids_BS[:, None, E - L : E, None] == ids_BS[:, None, None, :E])
    if mask is not None:
        if mask.dtype != torch.bool:
            raise _unsupported(
                f"an attention mask of dtype {mask.dtype}", "a bool mask, true where not to look"
            )
        allowed = allowed & ~mask
    return allowed


@cache
def _warn_of_mask_once(is_cuda: bool) -> None:
    if is_cuda:
        warnings.warn(
            "softmax attention builds an explicit mask, one byte per query and key of every sequence: packed "
            "documents avoid it in bf16 or fp16, with head sizes that are multiples of 8 and at most 256, "
            "--attention-dropout 0 and no attention mask tensor",
            stacklevel=2,
        )


def _refuse_unsupported(
    config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str
) -> None:
    if attn_mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal) or attention_type != "self":
        raise _unsupported(
            f"{attention_type} attention with mask type {attn_mask_type}", "causal self attention"
        )
    if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        raise _unsupported("sliding-window attention", "drop --window-size")
    if config.softmax_type != "vanilla":
        raise _unsupported(f"softmax type {config.softmax_type!r}", "--softmax-type vanilla")
    if config.apply_query_key_layer_scaling:
        raise _unsupported("query-key layer scaling", "drop --apply-query-key-layer-scaling")
    if config.qk_clip or config.log_max_attention_logit:
        raise _unsupported(
            "reading the largest attention logit", "drop --qk-clip and --log-max-attention-logit"
        )


def _unsupported(what: str, instead: str) -> ValueError:
    return ValueError(
        f"softmax attention: {what} is not supported\n"
        f"  why: these layers run PyTorch's fused causal attention, which cannot do it\n"
        f"  try: {instead}; or --transformer-impl transformer_engine, if Transformer Engine is installed"
    )

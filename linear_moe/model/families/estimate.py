"""Rows of the embedding and a rough parameter count, by arithmetic alone: the launcher needs them before torch."""

import math

from linear_moe.model.families.table import ModelSize

_PROJECTIONS = {
    "based": 2.25,
    "rebased": 2.25,
    "deltanet": 4,
    "gla": 4,
    "hgrn2": 4,
    "kda": 4.3,
    "rwkv6": 4.3,
    "rwkv7": 4.3,
    "gsa": 4.5,
    "mamba2": 6.03,
    "retention": 8,
    "mom_based": 6.75,
    "mom_rebased": 6.75,
    "mom_gla": 10,
    "mom_deltanet": 12,
    "mom_hgrn2": 12,
    "mom_kda": 12.7,
    "mom_gsa": 14.5,
    "mom_retention": 20,
}
"""Matrices `hidden x heads * head_dim` that a mixer with default options is worth, where they are not q, k, v, output
gate and output projection (5), and in a mixture k and v of four memories more (13). A test compares every mixer of the
package with the built model."""

_AS_WIDE_AS_HIDDEN = ("mamba2", "hgrn2", "mom_hgrn2")
"""Mixers that choose their own heads: those are as wide as the residual stream together, whatever softmax's are."""


_CHANNELS = {"mamba2": 256}
"""Channels that a mixer has beside those, however wide the model is."""


def padded_vocab_size(rows: int, tensor_parallel: int = 1) -> int:
    """`rows` rounded up to a multiple of 128 that every TP dividing 128 shares, so that layouts share checkpoints."""
    multiple = math.lcm(128, tensor_parallel)
    return -(-rows // multiple) * multiple


def estimate_parameters(size: ModelSize, kinds: tuple[str, ...], vocab_rows: int) -> tuple[int, int]:
    """Rough parameter count `(total, active per token)` of embeddings, projections and experts; nothing small."""
    hidden, width = size.hidden_size, size.num_attention_heads * size.kv_channels
    softmax = _latent_attention(size) if size.has_latent_attention else _attention(size)
    shared = vocab_rows * hidden * (1 if size.tie_embeddings else 2)
    shared += sum(softmax if kind == "softmax" else _mixer(kind, hidden, width) for kind in kinds)
    moe = size.moe_layers()
    shared += moe.count(False) * 3 * hidden * size.ffn_hidden_size
    if not size.is_moe:
        return shared, shared
    assert size.num_experts is not None
    wide = 3 * hidden * (size.moe_shared_expert_intermediate_size or 0)
    shared += moe.count(True) * (wide + hidden * size.num_experts)
    experts = moe.count(True) * 3 * hidden * (size.moe_ffn_hidden_size or size.ffn_hidden_size)
    return shared + experts * size.num_experts, shared + experts * size.moe_router_topk


def _mixer(kind: str, hidden: int, width: int) -> int:
    wide = hidden if kind in _AS_WIDE_AS_HIDDEN else width
    usual = 13 if kind.startswith("mom_") else 5
    return round((_PROJECTIONS.get(kind, usual) * wide + _CHANNELS.get(kind, 0)) * hidden)


def _attention(size: ModelSize) -> int:
    q, kv = size.num_attention_heads * size.kv_channels, size.num_query_groups * size.kv_channels
    gate = q if size.attention_output_gate else 0
    return size.hidden_size * (2 * (q + kv) + gate)


def _latent_attention(size: ModelSize) -> int:
    assert size.kv_lora_rank is not None and size.v_head_dim is not None
    assert size.qk_head_dim is not None and size.qk_pos_emb_head_dim is not None
    hidden, heads, rank = size.hidden_size, size.num_attention_heads, size.kv_lora_rank
    q = heads * (size.qk_head_dim + size.qk_pos_emb_head_dim)
    queries = hidden * q if size.q_lora_rank is None else size.q_lora_rank * (hidden + q)
    down = hidden * (rank + size.qk_pos_emb_head_dim)
    up = rank * heads * (size.qk_head_dim + size.v_head_dim)
    return queries + down + up + heads * size.v_head_dim * hidden

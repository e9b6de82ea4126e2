"""Floating-point operations of a model, counted per part from its real shapes.

One multiply-add counts 2. A mixer counts what its definition does per token, so it is linear in the sequence length;
softmax attention counts the causal half of its score matrix. Element-wise work is not counted.

Letters: S tokens of a sequence, D hidden, H heads, V vocabulary rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from linear_moe import lsm
from linear_moe.lsm import Mixer
from linear_moe.model.config import LatentMoEConfig, LinearMoEConfig, mixer_config
from linear_moe.model.pattern import SOFTMAX
from linear_moe.model.specs import moe_layers

BACKWARD_AND_FORWARD = 3
"""A training step costs three forward passes: one more product for each operand of every product."""


@dataclass(frozen=True)
class FlopsPerToken:
    """Forward operations per token of a whole model, and softmax scores per pair of tokens.

    Attributes:
        mixers: mixers and softmax projections, everything in the attention slot but the scores.
        feed_forward: dense feed-forward, router, the chosen experts and the shared one.
        head: output logits.
        per_pair: softmax attention, per causal pair of tokens of a sequence.
    """

    mixers: int
    feed_forward: int
    head: int
    per_pair: int

    def training(self, tokens: float, squared_lengths: float) -> float:
        """One step over ``tokens`` tokens whose documents' squared lengths sum to ``squared_lengths``."""
        linear = (self.mixers + self.feed_forward + self.head) * tokens
        return BACKWARD_AND_FORWARD * (linear + self.per_pair * squared_lengths / 2)

    def of_step(self, tokens: float, seq_length: int, squared_lengths: float | None = None) -> float:
        """The same for sequences of one length, unless the documents' squared lengths are given."""
        return self.training(tokens, tokens * seq_length if squared_lengths is None else squared_lengths)


def flops_per_token(config: LinearMoEConfig, vocab_rows: int) -> FlopsPerToken:
    """Count a model from its config."""
    moe = moe_layers(config)
    softmax_layers = config.layer_kinds.count(SOFTMAX)
    return FlopsPerToken(
        mixers=sum(
            _softmax_projections(config)
            if kind == SOFTMAX
            else mixer_flops(kind, config, config.layer_kinds[:layer].count(kind))
            for layer, kind in enumerate(config.layer_kinds)
        ),
        feed_forward=sum(_experts(config) if is_moe else _dense(config) for is_moe in moe),
        head=2 * config.hidden_size * vocab_rows,
        per_pair=softmax_layers
        * 2
        * config.num_attention_heads
        * sum(_head_widths(config)),  # scores, weighted sum
    )


def mixer_flops(kind: str, config: LinearMoEConfig, layer_of_kind: int) -> int:
    """Forward operations of one layer of a mixer per token: projections, short convolution, recurrence."""
    mixer: Mixer = lsm.get(kind)(mixer_config(kind, config))
    cfg = mixer.cfg
    hidden, heads = config.hidden_size, cfg.num_heads
    total = 2 * hidden * heads * mixer.fused_width
    for p in mixer.low_rank_projections(layer_of_kind):
        assert p.rank is not None
        total += 2 * p.rank * (hidden + heads * p.width)
    total += 2 * hidden * mixer.num_groups * mixer.grouped_width
    total += 2 * (heads * mixer.conv_channels + mixer.num_groups * mixer.group_conv_channels) * cfg.conv_size
    total += heads * mixer.scan_flops_per_token() + mixer.extra_flops_per_token()
    return total + 2 * heads * cfg.head_v_dim * hidden


def _head_widths(config: LinearMoEConfig) -> tuple[int, int]:
    """Width of a key and of a value of one head of softmax attention."""
    if isinstance(config, LatentMoEConfig):
        return config.qk_head_dim + config.qk_pos_emb_head_dim, config.v_head_dim
    assert config.kv_channels is not None
    return config.kv_channels, config.kv_channels


def _softmax_projections(config: LinearMoEConfig) -> int:
    if isinstance(config, LatentMoEConfig):
        return _latent_projections(config)
    assert config.kv_channels is not None and config.num_query_groups is not None
    q = config.num_attention_heads * config.kv_channels
    kv = 2 * config.num_query_groups * config.kv_channels
    gate = q if config.attention_output_gate else 0
    return 2 * config.hidden_size * (2 * q + kv + gate)


def _latent_projections(config: LatentMoEConfig) -> int:
    """Down to what is compressed, and up to all heads, as training does it (decoding may absorb the latter)."""
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    k, v = _head_widths(config)
    q_rank: int | None = config.q_lora_rank
    queries = hidden * heads * k if q_rank is None else q_rank * (hidden + heads * k)
    down = hidden * (rank + config.qk_pos_emb_head_dim)
    up = rank * heads * (config.qk_head_dim + v)
    return 2 * (queries + down + up + heads * v * hidden)


def _feed_forward(config: LinearMoEConfig, width: int) -> int:
    matrices = 3 if config.gated_linear_unit else 2
    return 2 * matrices * config.hidden_size * width


def _dense(config: LinearMoEConfig) -> int:
    assert config.ffn_hidden_size is not None
    return _feed_forward(config, config.ffn_hidden_size)


def _experts(config: LinearMoEConfig) -> int:
    assert config.num_moe_experts is not None and config.moe_ffn_hidden_size is not None
    router = 2 * config.hidden_size * config.num_moe_experts
    total = router + config.moe_router_topk * _feed_forward(config, config.moe_ffn_hidden_size)
    if config.moe_shared_expert_intermediate_size:
        total += _feed_forward(config, config.moe_shared_expert_intermediate_size)
        total += 2 * config.hidden_size if config.moe_shared_expert_gate else 0
    return total

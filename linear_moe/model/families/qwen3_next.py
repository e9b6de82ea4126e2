"""Qwen3-Next (the model card and config.json of Qwen/Qwen3-Next-80B-A3B-Instruct on Hugging Face).

Three of four published layers are gated DeltaNet, each fourth is softmax attention with an output gate, normed queries
and keys and positions in a quarter of the channels. 16 keys of 128 channels have two values of 128 each: that is
LA_MODULE=gated_deltanet LAYER_TYPE_LIST=LLLN EXTRA_ARGS="--gated-deltanet-expand-k 0.5 --gated-deltanet-expand-v 0.5
--gated-deltanet-values-per-key 2". Norm weights count from one. The router renormalises the chosen experts; the shared
expert has a sigmoid gate.
"""

from dataclasses import replace

from linear_moe.model.families.table import Family, ModelSize

_80B = ModelSize(
    num_layers=48,
    hidden_size=2048,
    ffn_hidden_size=5120,
    num_attention_heads=16,
    num_query_groups=2,
    kv_channels=256,
    num_experts=512,
    moe_router_topk=10,
    moe_ffn_hidden_size=512,
    moe_shared_expert_intermediate_size=512,
    attention_output_gate=True,
    rotary_base=10_000_000,
    max_position_embeddings=262144,
    vocab_size=151643,
    extra_vocab_size=293,
    source="Hugging Face Qwen/Qwen3-Next-80B-A3B-Instruct",
)

QWEN3_NEXT = Family(
    name="qwen3_next",
    default_size="80B-A3B",
    softmax_before_topk=False,
    shared_expert_gate=True,
    qk_norm=True,
    zero_centered_norms=True,
    rotary_percent=0.25,
    sizes={
        "80B-A3B": _80B,
        "tiny": replace(
            _80B,
            num_layers=4,
            hidden_size=128,
            ffn_hidden_size=256,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=32,
            num_experts=8,
            moe_router_topk=2,
            moe_ffn_hidden_size=64,
            moe_shared_expert_intermediate_size=64,
            max_position_embeddings=2048,
            vocab_size=1024,
            extra_vocab_size=0,
            source="for tests",
        ),
    },
)

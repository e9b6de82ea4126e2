"""Qwen2, dense and with 64 experts (arXiv 2407.10671: sizes in table 1, switches in section 2.2).

Biases on q, k and v only. The router takes the softmax over all experts and does not renormalise the chosen ones; the
shared expert of A14B is multiplied by a sigmoid gate of the token. A0.3B and A1B are the earlier Linear-MoE system's
own (arXiv 2503.05447, table 2), with small experts and no shared one.
"""

from dataclasses import replace

from linear_moe.model.families.table import Family, ModelSize

_DENSE_05B = ModelSize(
    num_layers=24,
    hidden_size=896,
    ffn_hidden_size=4864,
    num_attention_heads=14,
    num_query_groups=2,
    kv_channels=64,
    tie_embeddings=True,
    rotary_base=1_000_000,
    max_position_embeddings=131072,
    vocab_size=151643,
    extra_vocab_size=293,
    source="Hugging Face Qwen/Qwen2-0.5B",
)

_A03B = ModelSize(
    num_layers=12,
    hidden_size=1024,
    ffn_hidden_size=896,
    num_attention_heads=8,
    num_query_groups=8,
    kv_channels=128,
    num_experts=64,
    moe_router_topk=8,
    moe_ffn_hidden_size=896,
    rotary_base=10_000,
    max_position_embeddings=131072,
    vocab_size=151643,
    extra_vocab_size=293,
    source="arXiv 2503.05447, table 2",
)

_TINY = replace(
    _A03B,
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=256,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=32,
    num_experts=8,
    moe_router_topk=2,
    moe_ffn_hidden_size=64,
    vocab_size=1024,
    extra_vocab_size=0,
    source="for tests: every parallel dimension fits",
)

QWEN2 = Family(
    name="qwen2",
    default_size="A0.3B",
    add_qkv_bias=True,
    softmax_before_topk=True,
    shared_expert_gate=True,
    sizes={
        "0.5B": _DENSE_05B,
        "1.5B": replace(
            _DENSE_05B,
            num_layers=28,
            hidden_size=1536,
            ffn_hidden_size=8960,
            num_attention_heads=12,
            kv_channels=128,
            source="Hugging Face Qwen/Qwen2-1.5B",
        ),
        "7B": replace(
            _DENSE_05B,
            num_layers=28,
            hidden_size=3584,
            ffn_hidden_size=18944,
            num_attention_heads=28,
            num_query_groups=4,
            kv_channels=128,
            tie_embeddings=False,
            extra_vocab_size=421,
            source="Hugging Face Qwen/Qwen2-7B",
        ),
        "72B": replace(
            _DENSE_05B,
            num_layers=80,
            hidden_size=8192,
            ffn_hidden_size=29568,
            num_attention_heads=64,
            num_query_groups=8,
            kv_channels=128,
            tie_embeddings=False,
            norm_epsilon=1e-5,
            extra_vocab_size=421,
            source="Hugging Face Qwen/Qwen2-72B",
        ),
        "A0.3B": _A03B,
        "A1B": replace(
            _A03B,
            num_layers=16,
            hidden_size=2048,
            ffn_hidden_size=1024,
            num_attention_heads=16,
            num_query_groups=16,
            moe_ffn_hidden_size=1024,
        ),
        "A14B": replace(
            _DENSE_05B,
            num_layers=28,
            hidden_size=3584,
            ffn_hidden_size=18944,
            num_attention_heads=28,
            num_query_groups=4,
            kv_channels=128,
            num_experts=64,
            moe_router_topk=8,
            moe_ffn_hidden_size=2560,
            moe_shared_expert_intermediate_size=20480,
            tie_embeddings=False,
            source="Hugging Face Qwen/Qwen2-57B-A14B",
        ),
        "tiny": _TINY,
        "tiny-dense": _TINY.dense(),
        "demo": replace(
            _TINY,
            moe_ffn_hidden_size=128,
            source="for `make demo`: learns code and prose on two cores in minutes",
        ),
    },
    old_sizes={"0.5Boriginal": "0.5B"},
)

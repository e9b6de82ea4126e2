"""Mixtral (arXiv 2401.04088, table 1): eight experts in every layer, softmax over the two that are chosen.

Small is the earlier Linear-MoE system's own, with experts as wide as those of 8x7B.
"""

from dataclasses import replace

from linear_moe.model.families.table import Family, ModelSize

_8X7B = ModelSize(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    num_experts=8,
    moe_router_topk=2,
    moe_ffn_hidden_size=14336,
    rotary_base=1_000_000,
    norm_epsilon=1e-5,
    max_position_embeddings=32768,
    vocab_size=32000,
    extra_vocab_size=0,
    source="Hugging Face mistralai/Mixtral-8x7B-v0.1",
)

MIXTRAL = Family(
    name="mixtral",
    default_size="Small",
    softmax_before_topk=False,
    sizes={
        "Small": replace(
            _8X7B,
            num_layers=8,
            hidden_size=1024,
            num_attention_heads=8,
            num_query_groups=8,
            source="the earlier system's run_pretrain_mistral.sh",
        ),
        "8x7B": _8X7B,
        "tiny": replace(
            _8X7B,
            num_layers=4,
            hidden_size=128,
            ffn_hidden_size=64,
            num_attention_heads=4,
            num_query_groups=2,
            kv_channels=32,
            moe_ffn_hidden_size=64,
            max_position_embeddings=2048,
            vocab_size=1024,
            source="for tests",
        ),
    },
    old_sizes={"7B": "8x7B"},
)

"""DeepSeek-V2 (arXiv 2405.04434: attention in section 2.1, experts in 2.2, sizes in 3.1.2 and appendix B).

Softmax layers compress keys and values (MLA) and stretch their positions by YaRN. The first feed-forward block is
dense. Two shared experts, without a gate, are one of twice the width. A21B limits a token to 3 of 8 groups of experts
and multiplies the router's probabilities by 16; they are the softmax over all experts, not renormalised.
"""

from dataclasses import replace

from linear_moe.model.families.table import Family, ModelSize, YarnRope

_YARN = YarnRope(factor=40.0, mscale=0.707, mscale_all_dim=0.707)

_A2_4B = ModelSize(
    num_layers=27,
    hidden_size=2048,
    ffn_hidden_size=10944,
    num_attention_heads=16,
    num_query_groups=16,
    kv_channels=128,
    kv_lora_rank=512,
    qk_head_dim=128,
    qk_pos_emb_head_dim=64,
    v_head_dim=128,
    num_experts=64,
    moe_router_topk=6,
    moe_ffn_hidden_size=1408,
    moe_shared_expert_intermediate_size=2 * 1408,
    first_dense_layers=1,
    rotary_base=10_000,
    rope_scaling=_YARN,
    max_position_embeddings=163840,
    vocab_size=100_000,
    extra_vocab_size=2400,
    source="Hugging Face deepseek-ai/DeepSeek-V2-Lite",
)

DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    default_size="A2.4B",
    softmax_before_topk=True,
    balance="seq_aux_loss",
    sizes={
        "A2.4B": _A2_4B,
        "A21B": replace(
            _A2_4B,
            num_layers=60,
            hidden_size=5120,
            ffn_hidden_size=12288,
            num_attention_heads=128,
            num_query_groups=128,
            kv_channels=40,
            q_lora_rank=1536,
            num_experts=160,
            moe_ffn_hidden_size=1536,
            moe_shared_expert_intermediate_size=2 * 1536,
            moe_router_num_groups=8,
            moe_router_group_topk=3,
            moe_router_topk_scaling_factor=16.0,
            source="Hugging Face deepseek-ai/DeepSeek-V2",
        ),
        "tiny": replace(
            _A2_4B,
            num_layers=4,
            hidden_size=128,
            ffn_hidden_size=256,
            num_attention_heads=4,
            num_query_groups=4,
            kv_channels=32,
            q_lora_rank=48,
            kv_lora_rank=32,
            qk_head_dim=32,
            qk_pos_emb_head_dim=16,
            v_head_dim=32,
            num_experts=8,
            moe_router_topk=3,
            moe_ffn_hidden_size=64,
            moe_shared_expert_intermediate_size=2 * 64,
            moe_router_num_groups=4,
            moe_router_group_topk=2,
            moe_router_topk_scaling_factor=4.0,
            max_position_embeddings=2048,
            vocab_size=1024,
            extra_vocab_size=0,
            source="for tests",
        ),
    },
)

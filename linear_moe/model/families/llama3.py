"""Llama 3 (arXiv 2407.21783, table 3): dense, grouped-query attention, rotary base 500000.

8B is Llama 3.1 and 1B is Llama 3.2, whose rotary frequencies are stretched to 131072 positions; 1B ties its embeddings.
0.3B is the earlier Linear-MoE system's own. MOE=true makes eight experts of each feed-forward block.
"""

from dataclasses import replace

from linear_moe.model.families.table import Family, Llama3Rope, ModelSize

_8B = ModelSize(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    rotary_base=500_000,
    rope_scaling=Llama3Rope(factor=8.0),
    norm_epsilon=1e-5,
    max_position_embeddings=131072,
    vocab_size=128_000,
    extra_vocab_size=256,
    source="Hugging Face meta-llama/Llama-3.1-8B",
)

_TINY = replace(
    _8B,
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=256,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=32,
    vocab_size=1024,
    extra_vocab_size=0,
    source="for tests",
)

LLAMA3 = Family(
    name="llama3",
    default_size="1B",
    softmax_before_topk=False,
    sizes={
        "0.3B": replace(
            _8B,
            num_layers=12,
            hidden_size=1024,
            ffn_hidden_size=4096,
            kv_channels=32,
            rope_scaling=None,
            source="the earlier system's run_pretrain_mcore_llama.sh",
        ),
        "1B": replace(
            _8B,
            num_layers=16,
            hidden_size=2048,
            ffn_hidden_size=8192,
            kv_channels=64,
            tie_embeddings=True,
            rope_scaling=Llama3Rope(factor=32.0),
            source="Hugging Face meta-llama/Llama-3.2-1B",
        ),
        "8B": _8B,
        "tiny": _TINY,
    },
)

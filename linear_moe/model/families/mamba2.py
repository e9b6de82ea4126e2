"""Mamba2 (arXiv 2405.21060; config.json of state-spaces/mamba2-130m to 2.7b on Hugging Face).

Every layer is a norm and a Mamba2 mixer, twice as wide as the residual stream; there are no feed-forward blocks. The
residual stream is float32 in any precision. Heads of 64 channels, state size 128, one group, convolutions of four
tokens: the mixer's defaults. Softmax layers, which no published size has, get heads of 64 channels, too.
"""

from dataclasses import replace

from linear_moe.model.families.table import Family, ModelSize

_130M = ModelSize(
    num_layers=24,
    hidden_size=768,
    ffn_hidden_size=0,
    num_attention_heads=12,
    num_query_groups=12,
    kv_channels=64,
    tie_embeddings=True,
    fp32_residual=True,
    rotary_base=10_000,
    norm_epsilon=1e-5,
    max_position_embeddings=1_048_576,  # no positions to run out of; published models were trained on 2048
    vocab_size=50254,
    extra_vocab_size=34,
    source="Hugging Face state-spaces/mamba2-130m",
)


def _size(name: str, layers: int, hidden: int) -> ModelSize:
    return replace(
        _130M,
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=hidden // 64,
        num_query_groups=hidden // 64,
        source=f"Hugging Face state-spaces/mamba2-{name.lower()}",
    )


MAMBA2 = Family(
    name="mamba2",
    default_size="130M",
    mixer="mamba2",
    softmax_before_topk=False,
    sizes={
        "130M": _130M,
        "370M": _size("370M", 48, 1024),
        "780M": _size("780M", 48, 1536),
        "1.3B": _size("1.3B", 48, 2048),
        "2.7B": _size("2.7B", 64, 2560),
        "tiny": replace(
            _130M,
            num_layers=4,
            hidden_size=128,
            num_attention_heads=4,
            num_query_groups=4,
            kv_channels=32,
            max_position_embeddings=2048,
            vocab_size=1024,
            extra_vocab_size=0,
            source="for tests",
        ),
    },
)

"""Model families as data: the published sizes of each family and the switches that tell the families apart.

One builder serves every family, so a family is a table. Nothing here imports Megatron or torch: the launcher reads it
before anything heavy starts. Sizes of `qwen2` follow the run scripts of the earlier Linear-MoE system (A0.3B and A1B
have 64 small experts, 8 of them active); its switches are those of the Qwen2 report (arXiv 2407.10671, section 2.2).
"""

import math
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """One named size of a family: the numbers that fix every weight's shape. Independent of any parallel layout."""

    num_layers: int
    """Decoder layers. Each holds one mixer and one feed-forward block."""

    hidden_size: int
    """Width of the residual stream."""

    ffn_hidden_size: int
    """Width of a dense SwiGLU feed-forward block; used by every layer when there are no experts."""

    num_attention_heads: int
    """Query heads of a softmax layer, and heads of a linear mixer."""

    num_query_groups: int
    """Key/value heads of a softmax layer (grouped-query attention). Linear mixers do not group."""

    kv_channels: int
    """Width of one head."""

    num_experts: int | None = None
    """Routed experts of each layer. None: dense feed-forward blocks."""

    moe_router_topk: int = 2
    """Experts each token visits."""

    moe_ffn_hidden_size: int | None = None
    """Width of one expert's SwiGLU block."""

    moe_shared_expert_intermediate_size: int | None = None
    """Width of the expert every token visits, gated by a sigmoid in qwen2. None: no shared expert."""

    rotary_base: int = 1_000_000
    """Base of the rotary embedding of softmax layers. Linear mixers have no rotary embedding."""

    norm_epsilon: float = 1e-6
    """Added to the mean square inside every RMSNorm."""

    max_position_embeddings: int = 131072
    """Longest sequence the family was published with; SEQ_LEN may not exceed it."""

    vocab_size: int = 151643
    """Vocabulary without EXTRA_VOCAB_SIZE. Used when TOKENIZER=null; a real tokenizer brings its own."""

    extra_vocab_size: int = 293
    """Default of EXTRA_VOCAB_SIZE: rows added above the tokenizer's base vocabulary (151643 + 293 = 151936)."""

    @property
    def is_moe(self) -> bool:
        """Whether the feed-forward blocks are mixtures of experts."""
        return self.num_experts is not None


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the sizes of one family share."""

    name: str
    """Name given to `--family`, and the value of BASE_MODEL."""

    default_size: str
    """Size used when MODEL_SIZE is not set."""

    add_qkv_bias: bool
    """Bias on the q, k, v projections of softmax layers. All other linear layers have none."""

    softmax_before_topk: bool
    """Router: softmax over all experts, then top-k without renormalising. False: softmax over the chosen k."""

    shared_expert_gate: bool
    """Multiply the shared expert's output by a sigmoid gate of the token."""

    tie_embeddings: bool
    """Share the input embedding with the output projection."""

    sizes: dict[str, ModelSize] = field(hash=False)
    """Named sizes: the values of MODEL_SIZE."""


_TINY = ModelSize(
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=256,
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=32,
    num_experts=8,
    moe_router_topk=2,
    moe_ffn_hidden_size=64,
    rotary_base=10_000,
    vocab_size=1024,
    extra_vocab_size=0,
)

_QWEN2_SIZES = {
    # 2.5B parameters, 0.3B active outside the embeddings.
    "A0.3B": ModelSize(
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
    ),
    # 7.3B parameters, 1.1B active outside the embeddings.
    "A1B": ModelSize(
        num_layers=16,
        hidden_size=2048,
        ffn_hidden_size=1024,
        num_attention_heads=16,
        num_query_groups=16,
        kv_channels=128,
        num_experts=64,
        moe_router_topk=8,
        moe_ffn_hidden_size=1024,
        rotary_base=10_000,
    ),
    # For tests: every parallel dimension fits, nothing is worth training.
    "tiny": _TINY,
    "tiny-dense": replace(_TINY, num_experts=None, moe_ffn_hidden_size=None),
    # For `make demo`: learns code and prose on two CPU cores in minutes.
    "demo": ModelSize(
        num_layers=4,
        hidden_size=128,
        ffn_hidden_size=256,
        num_attention_heads=4,
        num_query_groups=4,
        kv_channels=32,
        num_experts=8,
        moe_router_topk=2,
        moe_ffn_hidden_size=128,
        rotary_base=10_000,
        vocab_size=1024,
        extra_vocab_size=0,
    ),
}

FAMILIES = {
    "qwen2": Family(
        name="qwen2",
        default_size="A0.3B",
        add_qkv_bias=True,
        softmax_before_topk=True,
        shared_expert_gate=True,
        tie_embeddings=False,
        sizes=_QWEN2_SIZES,
    ),
}

# Megatron's flag of each ModelSize field, in the order they are passed. Also read backwards: a flag of this table in
# EXTRA_ARGS changes the size itself, so that every check sees it.
SIZE_FLAGS = {
    "num_layers": "--num-layers",
    "hidden_size": "--hidden-size",
    "ffn_hidden_size": "--ffn-hidden-size",
    "num_attention_heads": "--num-attention-heads",
    "num_query_groups": "--num-query-groups",
    "kv_channels": "--kv-channels",
    "rotary_base": "--rotary-base",
    "norm_epsilon": "--norm-epsilon",
    "max_position_embeddings": "--max-position-embeddings",
    "num_experts": "--num-experts",
    "moe_router_topk": "--moe-router-topk",
    "moe_ffn_hidden_size": "--moe-ffn-hidden-size",
    "moe_shared_expert_intermediate_size": "--moe-shared-expert-intermediate-size",
}
_EXPERT_FIELDS = (
    "num_experts",
    "moe_router_topk",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
)


def megatron_arguments(family: Family, size: ModelSize, *, moe_aux_loss_coeff: float = 1e-2) -> list[str]:
    """Megatron-Core 0.19 command-line flags of an architecture: shapes and switches, no layout, no data, no optimizer.

    `moe_aux_loss_coeff` weighs the load-balancing loss; it changes no shape but belongs to the router.
    """
    flags = []
    for name, flag in SIZE_FLAGS.items():
        value = getattr(size, name)
        if value is not None and (size.is_moe or name not in _EXPERT_FIELDS):
            flags += [flag, str(value)]
    flags += ["--group-query-attention", "--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear"]
    flags += ["--position-embedding-type", "rope", "--rotary-percent", "1.0"]
    if family.add_qkv_bias:
        flags.append("--add-qkv-bias")
    if not family.tie_embeddings:
        flags.append("--untie-embeddings-and-output-weights")
    if size.is_moe:
        flags += _router_arguments(family, size, moe_aux_loss_coeff)
    return flags


def _router_arguments(family: Family, size: ModelSize, moe_aux_loss_coeff: float) -> list[str]:
    flags = ["--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", repr(moe_aux_loss_coeff)]
    # all-to-all moves only the tokens an expert needs; float32 routing keeps top-k stable under bf16.
    flags += ["--moe-token-dispatcher-type", "alltoall", "--moe-router-dtype", "fp32"]
    if family.softmax_before_topk:
        flags.append("--moe-router-pre-softmax")
    if family.shared_expert_gate and size.moe_shared_expert_intermediate_size is not None:
        flags.append("--moe-shared-expert-gate")
    return flags


def padded_vocab_size(rows: int, tensor_parallel: int = 1) -> int:
    """`rows` rounded up to a multiple of 128 that every TP dividing 128 shares, so that layouts share checkpoints."""
    multiple = math.lcm(128, tensor_parallel)
    return -(-rows // multiple) * multiple


def estimate_parameters(
    size: ModelSize, kinds: tuple[str, ...], vocab_rows: int, *, tied: bool
) -> tuple[int, int]:
    """Rough parameter count `(total, active per token)` of embeddings, projections and experts; no norms, no gates.

    A linear mixer counts as q, k, v, output gate and output projection at full width.
    """
    hidden, width = size.hidden_size, size.num_attention_heads * size.kv_channels
    softmax = 2 * hidden * width + 2 * hidden * size.num_query_groups * size.kv_channels
    mixers = sum(softmax if kind == "softmax" else 5 * hidden * width for kind in kinds)
    embeddings = vocab_rows * hidden * (1 if tied else 2)
    shared = mixers + embeddings
    if not size.is_moe:
        total = shared + len(kinds) * 3 * hidden * size.ffn_hidden_size
        return total, total
    assert size.num_experts is not None and size.moe_ffn_hidden_size is not None
    expert = 3 * hidden * size.moe_ffn_hidden_size
    shared += len(kinds) * (
        3 * hidden * (size.moe_shared_expert_intermediate_size or 0) + hidden * size.num_experts
    )
    per_layer = len(kinds) * expert
    return shared + per_layer * size.num_experts, shared + per_layer * size.moe_router_topk

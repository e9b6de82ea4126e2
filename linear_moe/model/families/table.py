"""The rows and columns of the family tables: what a size says, what its family says for all of its sizes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Llama 3's stretched rotary embedding: slow frequencies are divided, fast ones kept (the code of Llama 3.1)."""

    factor: float
    """What the slow frequencies are divided by. The rest (1, 4, 8192 tokens) is the same for all Llama 3 models."""


@dataclass(frozen=True, kw_only=True)
class YarnRope:
    """YaRN's stretched rotary embedding (arXiv 2309.00071, section 3) as DeepSeek-V2 has it.

    The original length is 4096, beta_fast 32 and beta_slow 1: Megatron's defaults, for which it has no flags.
    """

    factor: float
    """Longest sequence over the original one; slow frequencies are divided by it."""

    mscale: float
    """Weight of the temperature in the rotary tables; only its ratio to `mscale_all_dim` counts there."""

    mscale_all_dim: float
    """Weight of the temperature in the softmax scale, which it enters squared."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """One named size of a family: the numbers that fix every weight's shape. Independent of any parallel layout."""

    num_layers: int
    """Decoder layers. Each holds one mixer and, unless its width is 0, one feed-forward block."""

    hidden_size: int
    """Width of the residual stream."""

    ffn_hidden_size: int
    """Width of a dense SwiGLU feed-forward block; used by every layer that has no experts. 0: those layers have none,
    and no norm before it."""

    num_attention_heads: int
    """Query heads of a softmax layer, and heads of a linear mixer."""

    num_query_groups: int
    """Key/value heads of a softmax layer (grouped-query attention). Linear mixers do not group."""

    kv_channels: int
    """Width of one head; with latent attention, of the linear mixers' heads alone."""

    q_lora_rank: int | None = None
    """Latent attention: width of the compressed query. None: queries are not compressed."""

    kv_lora_rank: int | None = None
    """Latent attention (MLA): width of the compressed keys and values. None: the softmax layers are ordinary ones."""

    qk_head_dim: int | None = None
    """Latent attention: width of the part of a query and key without positions."""

    qk_pos_emb_head_dim: int | None = None
    """Latent attention: width of the rotary part of a query, and of the one rotary key all heads share."""

    v_head_dim: int | None = None
    """Latent attention: width of a value head."""

    num_experts: int | None = None
    """Routed experts of each layer. None: dense feed-forward blocks."""

    moe_router_topk: int = 2
    """Experts each token visits."""

    moe_ffn_hidden_size: int | None = None
    """Width of one expert's SwiGLU block."""

    moe_shared_expert_intermediate_size: int | None = None
    """Width of the expert every token visits (of all shared experts together). None: no shared expert."""

    first_dense_layers: int = 0
    """Layers at the start whose feed-forward block is dense although the model has experts."""

    moe_router_num_groups: int | None = None
    """Groups the experts are divided into, for group-limited routing. None: every expert may be chosen."""

    moe_router_group_topk: int | None = None
    """Groups whose experts a token may visit."""

    moe_router_topk_scaling_factor: float | None = None
    """What the router's probabilities are multiplied by. None: 1."""

    attention_output_gate: bool = False
    """Multiply what a softmax head gives by a sigmoid gate, one per channel, projected as the query is."""

    tie_embeddings: bool = False
    """Share the input embedding with the output projection."""

    fp32_residual: bool = False
    """Keep the residual stream in float32 in a model of half precision."""

    rotary_base: int
    """Base of the rotary embedding of softmax layers. Linear mixers have no rotary embedding."""

    rope_scaling: Llama3Rope | YarnRope | None = None
    """How the rotary embedding was stretched to long sequences. None: not at all."""

    norm_epsilon: float = 1e-6
    """Added to the mean square inside every RMSNorm."""

    max_position_embeddings: int
    """Longest sequence the family was published with; SEQ_LEN may not exceed it."""

    vocab_size: int
    """Vocabulary without EXTRA_VOCAB_SIZE. Used when TOKENIZER=null; a real tokenizer brings its own."""

    extra_vocab_size: int
    """Default of EXTRA_VOCAB_SIZE: rows added above the tokenizer's base vocabulary."""

    source: str
    """Where the numbers come from."""

    @property
    def is_moe(self) -> bool:
        """Whether the feed-forward blocks are mixtures of experts."""
        return self.num_experts is not None

    @property
    def has_feed_forward(self) -> bool:
        """Whether layers without experts have a feed-forward block."""
        return self.ffn_hidden_size > 0

    @property
    def has_latent_attention(self) -> bool:
        """Whether the softmax layers compress keys and values (MLA)."""
        return self.kv_lora_rank is not None

    def moe_layers(self) -> tuple[bool, ...]:
        """Whether each layer has experts."""
        return tuple(self.is_moe and i >= self.first_dense_layers for i in range(self.num_layers))

    def with_moe(self, moe: bool | None) -> "ModelSize":
        """The size with experts, without, or (None) as it is.

        A dense size gets eight experts in place of each feed-forward block, each as wide as the block, two of them for
        each token: as Mixtral has them, and as the earlier system's scripts did.
        """
        if moe is None or moe == self.is_moe:
            return self
        if not moe:
            return self.dense()
        return replace(self, num_experts=8, moe_router_topk=2, moe_ffn_hidden_size=self.ffn_hidden_size)

    def dense(self) -> "ModelSize":
        """The size without experts: a dense feed-forward block of `ffn_hidden_size` in every layer."""
        return replace(
            self,
            num_experts=None,
            moe_ffn_hidden_size=None,
            moe_shared_expert_intermediate_size=None,
            first_dense_layers=0,
            moe_router_num_groups=None,
            moe_router_group_topk=None,
            moe_router_topk_scaling_factor=None,
        )


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the sizes of one family share."""

    name: str
    """Name given to `--family`, and the value of BASE_MODEL."""

    default_size: str
    """Size used when MODEL_SIZE is not set."""

    mixer: str | None = None
    """Mixer of every layer of the published models, and of L layers when LA_MODULE is not set. None: they are softmax
    attention, but for Qwen3-Next, and LA_MODULE has its own default."""

    add_qkv_bias: bool = False
    """Bias on the q, k, v projections of softmax layers and mixers. All other linear layers have none."""

    softmax_before_topk: bool
    """Router: softmax over all experts, then top-k without renormalising. False: softmax over the chosen k."""

    shared_expert_gate: bool = False
    """Multiply the shared expert's output by a sigmoid gate of the token."""

    qk_norm: bool = False
    """RMSNorm of every query and key head of softmax layers. Latent attention norms what it compresses instead."""

    zero_centered_norms: bool = False
    """Weights of the norms before blocks, of the final one and of queries and keys are held as offsets from 1."""

    rotary_percent: float = 1.0
    """Part of a softmax head's channels, the first ones, that the rotary embedding turns."""

    balance: str = "aux_loss"
    """Load balancing of the experts: aux_loss over a micro batch, or seq_aux_loss over each sequence."""

    sizes: Mapping[str, ModelSize] = field(hash=False)
    """Named sizes: the values of MODEL_SIZE."""

    old_sizes: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Names the earlier system's scripts had for sizes of this table."""

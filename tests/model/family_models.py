"""Each family's model beside Hugging Face's class for it: shrunken sizes, the same random weights in both.

Ours is built from the command line the launcher would pass, in a worker; its weights are renamed here for
``transformers``, which runs in the test's process. Letters: E experts, F feed-forward width, D hidden, H query heads,
G key/value heads, K head dim.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from linear_moe.model.families import FAMILIES, Family, Llama3Rope, ModelSize, YarnRope, megatron_arguments

VOCAB = 128
NO_SHARED_EXPERT = 8
"""Width of the shared expert, of zeros, that Qwen2-MoE's class has where the size has none."""
PUBLISHED = [
    (family.name, size)
    for family in FAMILIES.values()
    for size in family.sizes
    if size not in ("tiny", "tiny-dense", "demo")
]


def shrunken(size: ModelSize) -> ModelSize:
    """The same switches, proportions of heads and kinds of layers, at a hidden width of 64."""
    small: dict[str, Any] = {"num_layers": 3 if size.first_dense_layers else 2, "hidden_size": 64}
    small |= {
        "ffn_hidden_size": 96 if size.has_feed_forward else 0,
        "num_attention_heads": 4,
        "kv_channels": 16,
    }
    small["num_query_groups"] = max(1, 4 * size.num_query_groups // size.num_attention_heads)
    small |= {"vocab_size": VOCAB, "extra_vocab_size": 0}
    if size.is_moe:
        small |= {
            "num_experts": 8,
            "moe_ffn_hidden_size": 32,
            "moe_router_topk": min(size.moe_router_topk, 4),
        }
        if size.moe_shared_expert_intermediate_size:
            small["moe_shared_expert_intermediate_size"] = 64
        if size.moe_router_num_groups:
            small |= {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
    if size.has_latent_attention:
        small |= {"kv_lora_rank": 24, "qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 12}
        small["q_lora_rank"] = size.q_lora_rank and 20
    return replace(size, **small)


def command_line(family: Family, size: ModelSize, kinds: list[str], *extra: str) -> list[str]:
    """What the launcher says of the model, and the least that Megatron wants to hear of a training."""
    return [
        *megatron_arguments(family, size),
        *("--layer-kinds", ",".join(kinds), "--padded-vocab-size", str(VOCAB)),
        *("--seq-length", "64", "--micro-batch-size", "1", "--train-iters", "1", "--lr", "1e-4"),
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCAB - 1), "--mock-data"),
        *("--attention-dropout", "0", "--hidden-dropout", "0", "--num-workers", "0", *extra),
    ]


def build(
    family: Family,
    size: ModelSize,
    kinds: list[str] | None = None,
    *extra: str,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The whole model on this rank, with weights far from their initial ones. In a worker."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from linear_moe.model.builder import LinearMoEBuilder
    from linear_moe.training import arguments
    from linear_moe.training.pretrain import prepare_arguments

    kinds = kinds or [family.mixer or "softmax"] * size.num_layers
    args = prepare_arguments(command_line(family, size, kinds, *extra))
    config = arguments.model_config(args)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=args.tensor_model_parallel_size)
    model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    model = LinearMoEBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def tokens(batch: int = 2, length: int = 48) -> Tensor:
    """``[B, T]``, the same every time."""
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(7))


def logits(model: Any) -> Tensor:
    """``[B, T, V]`` of :func:`tokens`, all at once."""
    tokens_BT = tokens()
    return model(tokens_BT, torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT), None)


def ours(
    rank: int, world: int, cases: list[tuple[Family, ModelSize]]
) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Weights and logits of each family's model, of softmax layers or of its mixer. In a worker."""
    from tests.workers import leave_model_parallel

    found = []
    for family, size in cases:
        model = build(family, size)
        with torch.no_grad():
            found.append((dict(model.named_parameters()), logits(model)))
        leave_model_parallel()
    return found


def theirs(family: Family, size: ModelSize, weights: dict[str, Tensor]) -> Tensor:
    """Logits ``[B, T, V]`` of the ``transformers`` class with our weights; strict about their names and shapes."""
    model = huggingface_class(family, size)(huggingface_config(family, size)).eval()
    state = renamed(size, weights)
    if family.name == "qwen2" and size.is_moe and not size.moe_shared_expert_intermediate_size:
        # that class always has one: it adds nothing
        state |= {k: torch.zeros_like(v) for k, v in model.state_dict().items() if ".shared_expert" in k}
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        return model(tokens()).logits


def huggingface_class(family: Family, size: ModelSize) -> Any:
    """The class of ``transformers`` for a causal model of the family."""
    import transformers

    qwen2 = transformers.Qwen2MoeForCausalLM if size.is_moe else transformers.Qwen2ForCausalLM
    return {
        "qwen2": qwen2,
        "qwen3_next": transformers.Qwen3NextForCausalLM,
        "mixtral": transformers.MixtralForCausalLM,
        "llama3": transformers.LlamaForCausalLM,
        "deepseek_v2": transformers.DeepseekV2ForCausalLM,
        "mamba2": transformers.Mamba2ForCausalLM,
    }[family.name]


def huggingface_config(family: Family, size: ModelSize) -> Any:
    """The config with which that class is built, in its own words."""
    if family.name == "mamba2":
        return huggingface_class(family, size).config_class(
            vocab_size=size.vocab_size + size.extra_vocab_size,
            hidden_size=size.hidden_size,
            num_hidden_layers=size.num_layers,
            num_heads=2 * size.hidden_size // 64,
            n_groups=1,
            layer_norm_epsilon=size.norm_epsilon,
            tie_word_embeddings=size.tie_embeddings,
        )
    fields: dict[str, Any] = {
        "vocab_size": size.vocab_size + size.extra_vocab_size,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.ffn_hidden_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_attention_heads,
        "num_key_value_heads": size.num_query_groups,
        "rms_norm_eps": size.norm_epsilon,
        "max_position_embeddings": size.max_position_embeddings,
        "tie_word_embeddings": size.tie_embeddings,
        "rope_parameters": _rope(size),
        "attn_implementation": "eager",
        "pad_token_id": None,
    }
    if not size.has_latent_attention:
        fields["head_dim"] = size.kv_channels
    if family.name == "qwen3_next":
        fields["layer_types"] = ["full_attention"] * size.num_layers
        fields["rope_parameters"]["partial_rotary_factor"] = 0.25
    if size.is_moe:
        fields |= {"num_experts_per_tok": size.moe_router_topk}
        fields |= _experts(family.name, size)
    if size.has_latent_attention:
        fields |= {"q_lora_rank": size.q_lora_rank, "kv_lora_rank": size.kv_lora_rank}
        fields |= {"qk_nope_head_dim": size.qk_head_dim, "qk_rope_head_dim": size.qk_pos_emb_head_dim}
        fields |= {"v_head_dim": size.v_head_dim, "first_k_dense_replace": size.first_dense_layers}
    return huggingface_class(family, size).config_class(**fields)


def _experts(family: str, size: ModelSize) -> dict[str, Any]:
    shared = size.moe_shared_expert_intermediate_size
    if family == "mixtral":
        return {"num_local_experts": size.num_experts, "intermediate_size": size.moe_ffn_hidden_size}
    if family in ("qwen2", "qwen3_next"):
        own = {"num_experts": size.num_experts, "moe_intermediate_size": size.moe_ffn_hidden_size}
        own |= {"norm_topk_prob": family == "qwen3_next"}
        return own | {"shared_expert_intermediate_size": shared or NO_SHARED_EXPERT}
    assert family == "deepseek_v2" and shared and size.moe_ffn_hidden_size
    groups = size.moe_router_num_groups
    return {
        "n_routed_experts": size.num_experts,
        "moe_intermediate_size": size.moe_ffn_hidden_size,
        "n_shared_experts": shared // size.moe_ffn_hidden_size,
        "topk_method": "group_limited_greedy" if groups else "greedy",
        "n_group": groups or 1,
        "topk_group": size.moe_router_group_topk or 1,
        "routed_scaling_factor": size.moe_router_topk_scaling_factor or 1.0,
    }


def _rope(size: ModelSize) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": float(size.rotary_base), "rope_type": "default"}
    scaling = size.rope_scaling
    if isinstance(scaling, Llama3Rope):
        rope |= {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if isinstance(scaling, YarnRope):
        rope |= {"rope_type": "yarn", "factor": scaling.factor, "original_max_position_embeddings": 4096}
        rope |= {"beta_fast": 32, "beta_slow": 1, "mscale": scaling.mscale}
        rope |= {"mscale_all_dim": scaling.mscale_all_dim}
    return rope


def renamed(size: ModelSize, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters under Hugging Face's names, fused ones taken apart."""
    if not size.has_feed_forward:
        return renamed_mamba2(size, weights)
    state: dict[str, Tensor] = {}
    for name, weight in weights.items():
        state |= _renamed(size, name, weight)
    if size.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


WHOLE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.linear_q_proj.weight": "self_attn.q_proj.weight",
    "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_a_layernorm.weight",
    "self_attention.linear_q_up_proj.weight": "self_attn.q_b_proj.weight",
    "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.experts.fc1_weight": "mlp.experts.gate_up_proj",
    "mlp.experts.fc2_weight": "mlp.experts.down_proj",
    "mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight",
}
HEAD_NORMS = {f"self_attention.{x}_layernorm.weight": f"self_attn.{x}_norm.weight" for x in "qk"}
GATED = {"mlp.linear_fc1.weight": "mlp", "mlp.shared_experts.linear_fc1.weight": "mlp.shared"}


def _renamed(size: ModelSize, name: str, weight: Tensor) -> dict[str, Tensor]:
    if name in WHOLE:
        return {WHOLE[name]: weight}
    _, _, layer, part = name.split(".", 3)
    if size.attention_output_gate and part in HEAD_NORMS:
        return {f"model.layers.{layer}.{HEAD_NORMS[part]}": weight}
    shared = "mlp.shared_experts" if size.has_latent_attention else "mlp.shared_expert"
    if part in WHOLE:
        found = {WHOLE[part]: weight}
    elif part == "mlp.shared_experts.linear_fc2.weight":
        found = {f"{shared}.down_proj.weight": weight}
    elif part in GATED:
        gate, up = weight.chunk(2)
        place = GATED[part].replace("mlp.shared", shared)
        found = {f"{place}.gate_proj.weight": gate, f"{place}.up_proj.weight": up}
    else:
        assert part.startswith("self_attention.linear_qkv."), part
        found = {f"self_attn.{x}_proj.{part.split('.')[-1]}": w for x, w in _qkv(size, weight).items()}
    return {f"model.layers.{layer}.{key}": value for key, value in found.items()}


def _qkv(size: ModelSize, weight: Tensor) -> dict[str, Tensor]:
    """Megatron has, for each key/value head, its query heads, their gates, its key and its value in a row."""
    H, G, K = size.num_attention_heads, size.num_query_groups, size.kv_channels
    if size.attention_output_gate:  # there every query head is followed by its gate
        by_head = weight.unflatten(0, (G, 2 * (H // G) + 2, K))
        q, gate, k, v = by_head.split([H // G, H // G, 1, 1], dim=1)
        return {"q": torch.stack([q, gate], dim=2).flatten(0, 3), "k": k.flatten(0, 2), "v": v.flatten(0, 2)}
    parts = weight.unflatten(0, (G, H // G + 2, K)).split([H // G, 1, 1], dim=1)
    return {x: part.flatten(0, 2) for x, part in zip("qkv", parts, strict=True)}


def renamed_mamba2(size: ModelSize, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same of Mamba2: z, x, B, C, dt of all heads, one below the other; ours are x, dt, z of a head, and B, C."""
    state = {
        "backbone.embeddings.weight": weights["embedding.word_embeddings.weight"],
        "lm_head.weight": weights["embedding.word_embeddings.weight"],
        "backbone.norm_f.weight": weights["decoder.final_layernorm.weight"],
    }
    for layer in range(size.num_layers):
        prefix, theirs = f"decoder.layers.{layer}.", f"backbone.layers.{layer}."
        mine = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        state[theirs + "norm.weight"] = mine.pop("input_layernorm.weight")
        mine = {name.removeprefix("self_attention."): weight for name, weight in mine.items()}
        x, dt, z = mine.pop("in_proj.weight").unflatten(0, (-1, 129)).split([64, 1, 64], dim=1)
        parts = [z.flatten(0, 1), x.flatten(0, 1), mine.pop("group_proj.weight"), dt.flatten(0, 1)]
        state[theirs + "mixer.in_proj.weight"] = torch.cat(parts)
        for part in ("weight", "bias"):
            taps = torch.cat([mine.pop(f"{group}conv_{part}").flatten(0, 1) for group in ("", "group_")])
            state[theirs + f"mixer.conv1d.{part}"] = taps[:, None] if part == "weight" else taps
        state[theirs + "mixer.norm.weight"] = mine.pop("norm_weight").flatten()
        state |= {theirs + "mixer." + name: weight for name, weight in mine.items()}
    return state


@functools.cache
def huggingface_count(family: str, size: str) -> int:
    """Parameters of the published model, counted in its ``transformers`` class on the meta device."""
    numbers = FAMILIES[family].sizes[size]
    with torch.device("meta"):
        model = huggingface_class(FAMILIES[family], numbers)(huggingface_config(FAMILIES[family], numbers))
    return sum(parameter.numel() for parameter in model.parameters())

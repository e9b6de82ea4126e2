"""A size of a family as flags of Megatron-Core 0.19, and back: shapes and switches, no layout, data or optimizer."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from linear_moe.model.families.table import Family, Llama3Rope, ModelSize, YarnRope

SIZE_FLAGS = {
    "num_layers": "--num-layers",
    "hidden_size": "--hidden-size",
    "ffn_hidden_size": "--ffn-hidden-size",
    "num_attention_heads": "--num-attention-heads",
    "num_query_groups": "--num-query-groups",
    "kv_channels": "--kv-channels",
    "q_lora_rank": "--q-lora-rank",
    "kv_lora_rank": "--kv-lora-rank",
    "qk_head_dim": "--qk-head-dim",
    "qk_pos_emb_head_dim": "--qk-pos-emb-head-dim",
    "v_head_dim": "--v-head-dim",
    "rotary_base": "--rotary-base",
    "norm_epsilon": "--norm-epsilon",
    "max_position_embeddings": "--max-position-embeddings",
    "num_experts": "--num-experts",
    "moe_router_topk": "--moe-router-topk",
    "moe_ffn_hidden_size": "--moe-ffn-hidden-size",
    "moe_shared_expert_intermediate_size": "--moe-shared-expert-intermediate-size",
    "moe_router_num_groups": "--moe-router-num-groups",
    "moe_router_group_topk": "--moe-router-group-topk",
    "moe_router_topk_scaling_factor": "--moe-router-topk-scaling-factor",
}
"""Megatron's flag of each ModelSize field, in the order they are passed. Also read backwards: a flag of this table in
EXTRA_ARGS changes the size itself, so that every check sees it."""

FRACTIONS = ("norm_epsilon", "moe_router_topk_scaling_factor")
"""Fields of `SIZE_FLAGS` that are not whole numbers."""

SWITCHES = {
    "multi_latent_attention": "--multi-latent-attention",
    "add_qkv_bias": "--add-qkv-bias",
    "qk_layernorm": "--qk-layernorm",
    "layernorm_zero_centered_gamma": "--apply-layernorm-1p",
    "attention_output_gate": "--attention-output-gate",
    "untie_embeddings_and_output_weights": "--untie-embeddings-and-output-weights",
    "use_rope_scaling": "--use-rope-scaling",
    "moe_router_pre_softmax": "--moe-router-pre-softmax",
    "moe_shared_expert_gate": "--moe-shared-expert-gate",
}
"""Flags that change what a model computes by being there, under Megatron's names of the arguments."""

POSITION_FLAGS = {
    "rotary_percent": "--rotary-percent",
    "rope_scaling_factor": "--rope-scaling-factor",
    "rotary_scaling_factor": "--rotary-scaling-factor",
    "mscale": "--mscale",
    "mscale_all_dim": "--mscale-all-dim",
}
"""Flags with a number that change what a softmax layer computes, and no shape."""

_LATENT_FIELDS = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
_EXPERT_FIELDS = tuple(name for name in SIZE_FLAGS if name.startswith("moe_") or name == "num_experts")


def unused_fields(size: ModelSize) -> set[str]:
    """Fields of `SIZE_FLAGS` that mean nothing for attention of this kind; Megatron has defaults for them anyway."""
    # with latent attention all heads share one compressed key and value
    return {"num_query_groups"} if size.has_latent_attention else set(_LATENT_FIELDS)


def size_fields(size: ModelSize) -> dict[str, int | float]:
    """The fields of `SIZE_FLAGS` that say something about this size, with their values."""
    unused = unused_fields(size) | (set() if size.is_moe else set(_EXPERT_FIELDS))
    values = {name: getattr(size, name) for name in SIZE_FLAGS if name not in unused}
    return {name: value for name, value in values.items() if value is not None}


def megatron_arguments(family: Family, size: ModelSize, *, moe_aux_loss_coeff: float = 1e-2) -> list[str]:
    """Megatron's command-line flags of an architecture.

    `moe_aux_loss_coeff` weighs the load-balancing loss; it changes no shape but belongs to the router.
    """
    flags = [word for name, value in size_fields(size).items() for word in (SIZE_FLAGS[name], str(value))]
    flags += ["--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear"]
    flags += ["--position-embedding-type", "rope", "--rotary-percent", str(family.rotary_percent)]
    flags += _attention_arguments(size)
    switches = {
        "--add-qkv-bias": family.add_qkv_bias,
        "--qk-layernorm": family.qk_norm,
        "--apply-layernorm-1p": family.zero_centered_norms,
        "--attention-output-gate": size.attention_output_gate,
        "--fp32-residual-connection": size.fp32_residual,
    }
    flags += [flag for flag, is_on in switches.items() if is_on]
    if not size.tie_embeddings:
        flags.append("--untie-embeddings-and-output-weights")
    if size.is_moe:
        flags += _expert_arguments(family, size, moe_aux_loss_coeff)
    return flags


def _attention_arguments(size: ModelSize) -> list[str]:
    scaling = size.rope_scaling
    if size.has_latent_attention:
        # The norms of the compressed query and of the compressed keys and values; rotary in float32, unfused.
        flags = ["--multi-latent-attention", "--qk-layernorm", "--no-rope-fusion"]
        if not isinstance(scaling, YarnRope):
            return [*flags, "--rope-type", "rope", "--rotary-scaling-factor", "1.0"]
        flags += ["--rope-type", "yarn", "--rotary-scaling-factor", str(scaling.factor)]
        return [*flags, "--mscale", str(scaling.mscale), "--mscale-all-dim", str(scaling.mscale_all_dim)]
    assert not isinstance(scaling, YarnRope), "Megatron stretches ordinary attention by Llama 3's rule only"
    flags = ["--group-query-attention"]
    if isinstance(scaling, Llama3Rope):
        flags += ["--use-rope-scaling", "--rope-scaling-factor", str(scaling.factor)]
    return flags


def _expert_arguments(family: Family, size: ModelSize, moe_aux_loss_coeff: float) -> list[str]:
    flags = [
        "--moe-router-load-balancing-type",
        family.balance,
        "--moe-aux-loss-coeff",
        repr(moe_aux_loss_coeff),
    ]
    # all-to-all moves only the tokens an expert needs; float32 routing keeps top-k stable under bf16.
    flags += ["--moe-token-dispatcher-type", "alltoall", "--moe-router-dtype", "fp32"]
    if family.softmax_before_topk:
        flags.append("--moe-router-pre-softmax")
    if family.shared_expert_gate and size.moe_shared_expert_intermediate_size is not None:
        flags.append("--moe-shared-expert-gate")
    if size.first_dense_layers:
        flags += [
            "--moe-layer-freq",
            f"([0]*{size.first_dense_layers}+[1]*{size.num_layers - size.first_dense_layers})",
        ]
    return flags


def switches_of(arguments: Sequence[str]) -> dict[str, bool | float]:
    """What a command line says of `SWITCHES`, all of them, and of `POSITION_FLAGS`, those that it names."""
    given = flags_of(arguments)
    numbers = {name: float(given[flag]) for name, flag in POSITION_FLAGS.items() if flag in given}
    return {name: flag in given for name, flag in SWITCHES.items()} | numbers


def size_of(arguments: list[str]) -> ModelSize | None:
    """The size that `megatron_arguments` made these flags of; None when flags are missing.

    `vocab_size` is not among them: the tokenizer says it.
    """
    given = flags_of(arguments)
    numbers: dict[str, Any] = {
        name: (float if name in FRACTIONS else int)(given[flag])
        for name, flag in SIZE_FLAGS.items()
        if flag in given
    }
    dense = re.match(r"\(\[0\]\*(\d+)", given.get("--moe-layer-freq", ""))
    # Latent attention has no groups.
    numbers.setdefault("num_query_groups", numbers.get("num_attention_heads"))
    try:
        return ModelSize(
            **numbers,
            first_dense_layers=int(dense[1]) if dense else 0,
            attention_output_gate="--attention-output-gate" in given,
            tie_embeddings="--untie-embeddings-and-output-weights" not in given,
            fp32_residual="--fp32-residual-connection" in given,
            rope_scaling=_rope_scaling(given),
            vocab_size=1,
            extra_vocab_size=0,
            source="the checkpoint",
        )
    except TypeError:
        return None  # not from a run script


def _rope_scaling(given: Mapping[str, str]) -> Llama3Rope | YarnRope | None:
    def number(flag: str) -> float:
        return float(given.get(flag, 1))

    if given.get("--rope-type") == "yarn":
        scales = number("--mscale"), number("--mscale-all-dim")
        return YarnRope(factor=number("--rotary-scaling-factor"), mscale=scales[0], mscale_all_dim=scales[1])
    return Llama3Rope(factor=number("--rope-scaling-factor")) if "--use-rope-scaling" in given else None


def flags_of(arguments: Sequence[str]) -> dict[str, str]:
    """Each flag of a command line and the words behind it, "on" for none; of one that comes twice, the last."""
    starts = [i for i, word in enumerate(arguments) if word.startswith("--")]
    found = {}
    for first, end in itertools.pairwise([*starts, len(arguments)]):
        flag, _, value = arguments[first].partition("=")
        found[flag] = value or " ".join(arguments[first + 1 : end]) or "on"
    return found

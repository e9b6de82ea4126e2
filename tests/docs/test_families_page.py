"""docs/families.md says what the tables of `linear_moe.model.families` say."""

import re
from pathlib import Path

from linear_moe.model.families import (
    FAMILIES,
    Llama3Rope,
    ModelSize,
    YarnRope,
    estimate_parameters,
    padded_vocab_size,
)

PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text()


def row(family: str, name: str, size: ModelSize) -> str:
    """A line of the table of sizes."""
    rows = size.vocab_size + size.extra_vocab_size
    kinds = (FAMILIES[family].mixer or "softmax",) * size.num_layers
    counts = estimate_parameters(size, kinds, padded_vocab_size(rows))
    cells = [
        family,
        name,
        size.num_layers,
        size.hidden_size,
        heads(size),
        size.ffn_hidden_size or "-",
        experts(size),
    ]
    cells += [rope(size), f"{size.norm_epsilon:g}", "tied" if size.tie_embeddings else "-", rows]
    cells += [size.max_position_embeddings, " / ".join(map(short, counts)), size.source]
    return "| " + " | ".join(map(str, cells)) + " |"


def heads(size: ModelSize) -> str:
    if not size.has_latent_attention:
        return f"{size.num_attention_heads} / {size.num_query_groups} x {size.kv_channels}"
    q = f"q {size.q_lora_rank}, " if size.q_lora_rank else ""
    widths = f"{q}kv {size.kv_lora_rank}; {size.qk_head_dim}+{size.qk_pos_emb_head_dim}, {size.v_head_dim}"
    return f"{size.num_attention_heads} x ({widths}); mixers x {size.kv_channels}"


def experts(size: ModelSize) -> str:
    if not size.is_moe:
        return "-"
    text = f"{size.num_experts}, top {size.moe_router_topk}, {size.moe_ffn_hidden_size}"
    if size.moe_router_num_groups:
        text += f", {size.moe_router_group_topk} of {size.moe_router_num_groups} groups"
    if size.moe_router_topk_scaling_factor:
        text += f", times {size.moe_router_topk_scaling_factor:g}"
    if size.moe_shared_expert_intermediate_size:
        text += f"; shared {size.moe_shared_expert_intermediate_size}"
    return text + (f"; after {size.first_dense_layers} dense" if size.first_dense_layers else "")


def rope(size: ModelSize) -> str:
    base, scaling = f"{size.rotary_base:.0e}".replace("e+0", "e"), size.rope_scaling
    if isinstance(scaling, YarnRope):
        return f"{base}, YaRN {scaling.factor:g}"
    return f"{base}, Llama {scaling.factor:g}" if isinstance(scaling, Llama3Rope) else base


def short(count: int) -> str:
    return f"{count / 1e9:.3g}B" if count >= 1e8 else f"{count / 1e6:.2g}M"


def test_the_table_of_sizes():
    expected = [row(f.name, name, size) for f in FAMILIES.values() for name, size in f.sizes.items()]
    names = "|".join(FAMILIES)
    assert re.findall(rf"^\| (?:{names}) \|.*\|$", PAGE, re.MULTILINE) == expected, "\n" + "\n".join(expected)


def test_the_table_of_switches():
    for family in FAMILIES.values():
        (line,) = re.findall(rf"^\| `{family.name}` \|.*$", PAGE, re.MULTILINE)
        _, _, default, bias, router, gate, balance, _ = (cell.strip() for cell in line.split("|"))
        assert default == family.default_size
        assert bias == ("q, k, v" if family.add_qkv_bias else "none")
        assert router.startswith(
            "softmax, then top-k" if family.softmax_before_topk else "top-k, then softmax"
        )
        assert gate == ("sigmoid of the token" if family.shared_expert_gate else "none")
        assert balance.startswith(f"`{family.balance}`")

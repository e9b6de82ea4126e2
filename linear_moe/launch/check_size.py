"""Checks of a size that EXTRA_ARGS has changed: numbers that Megatron would stumble over in the first step."""

import itertools

from linear_moe.launch.check_layout import divisors, nearest
from linear_moe.launch.errors import PreflightError
from linear_moe.launch.plan import RunPlan
from linear_moe.model.pattern import SOFTMAX


def check_attention(plan: RunPlan) -> None:
    """Softmax layers have whole groups of heads, and pairs of channels to turn."""
    size, name = plan.size, f"{plan.family.name} {plan.size_name}"
    if SOFTMAX not in plan.kinds or size.has_latent_attention:
        return
    heads, groups = size.num_attention_heads, size.num_query_groups
    if heads % groups:
        raise PreflightError(
            f"{heads} heads of {name} do not make {groups} equal groups.",
            "the softmax layers share each key and value among the heads of a group.",
            f"EXTRA_ARGS='--num-attention-heads {heads} --num-query-groups {nearest(groups, divisors(heads))}'",
        )
    turned = int(size.kv_channels * plan.family.rotary_percent)
    if turned % 2:
        whole = next(
            n for n in itertools.count(size.kv_channels) if int(n * plan.family.rotary_percent) % 2 == 0
        )
        raise PreflightError(
            f"a head of {name} has {size.kv_channels} channels, {turned} of them with positions.",
            "rotary positions of softmax layers turn channels in pairs.",
            f"EXTRA_ARGS='--kv-channels {whole}'",
        )

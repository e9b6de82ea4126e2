"""Linear-recurrence kernels: pure functions of tensors, no Megatron and no mixers."""

from linear_moe.kernels.gates import (
    bounded_decay_of,
    edit_keys,
    gated_group_norm,
    lerp_tokens,
    log_decay_of,
)
from linear_moe.kernels.gradients import grouped_weight_grad_
from linear_moe.kernels.ops import (
    conv_and_split,
    delta_rule,
    delta_rule_segment,
    diag_decay,
    diag_decay_segment,
    dplr_delta_rule,
    dplr_delta_rule_segment,
    gated_rms_norm,
    rms_norm,
    rotate_heads,
    scale_heads,
    short_conv,
    skip_gate_norm,
)
from linear_moe.kernels.optimizer import adam_
from linear_moe.kernels.segment import Segment
from linear_moe.kernels.tokens import (
    choose_experts,
    collect_rows,
    cross_entropy_,
    sort_slots,
    spread_rows,
    weighted_swiglu,
)

__all__ = [
    "Segment",
    "adam_",
    "bounded_decay_of",
    "choose_experts",
    "collect_rows",
    "conv_and_split",
    "cross_entropy_",
    "delta_rule",
    "delta_rule_segment",
    "diag_decay",
    "diag_decay_segment",
    "dplr_delta_rule",
    "dplr_delta_rule_segment",
    "edit_keys",
    "gated_group_norm",
    "gated_rms_norm",
    "grouped_weight_grad_",
    "lerp_tokens",
    "log_decay_of",
    "rms_norm",
    "rotate_heads",
    "scale_heads",
    "short_conv",
    "skip_gate_norm",
    "sort_slots",
    "spread_rows",
    "weighted_swiglu",
]

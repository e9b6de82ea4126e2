"""Model families as data: the published sizes of each family and the switches that tell the families apart.

One builder serves every family, so a family is a table: one file each. Nothing here imports Megatron or torch: the
launcher reads it before anything heavy starts. `docs/families.md` shows the tables and says how to add one.
"""

from linear_moe.model.families.arguments import (
    FRACTIONS,
    POSITION_FLAGS,
    SIZE_FLAGS,
    SWITCHES,
    flags_of,
    megatron_arguments,
    size_fields,
    size_of,
    switches_of,
    unused_fields,
)
from linear_moe.model.families.deepseek_v2 import DEEPSEEK_V2
from linear_moe.model.families.estimate import estimate_parameters, padded_vocab_size
from linear_moe.model.families.llama3 import LLAMA3
from linear_moe.model.families.mamba2 import MAMBA2
from linear_moe.model.families.mixtral import MIXTRAL
from linear_moe.model.families.qwen2 import QWEN2
from linear_moe.model.families.qwen3_next import QWEN3_NEXT
from linear_moe.model.families.table import Family, Llama3Rope, ModelSize, YarnRope

FAMILIES = {family.name: family for family in (QWEN2, QWEN3_NEXT, DEEPSEEK_V2, MIXTRAL, LLAMA3, MAMBA2)}
"""Every family by the name that `--family` and BASE_MODEL know."""

__all__ = [
    "FAMILIES",
    "FRACTIONS",
    "POSITION_FLAGS",
    "SIZE_FLAGS",
    "SWITCHES",
    "Family",
    "Llama3Rope",
    "ModelSize",
    "YarnRope",
    "estimate_parameters",
    "flags_of",
    "megatron_arguments",
    "padded_vocab_size",
    "size_fields",
    "size_of",
    "switches_of",
    "unused_fields",
]

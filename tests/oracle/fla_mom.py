"""Cases of mixtures of memories, against the layer of flash-linear-attention.

That layer is an oracle in evaluation only: in training its convolution runs across the memories, and so across batch
rows and from later tokens to earlier ones. Its sort must keep the order of equals (``fla_in_torch.StableSort``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.oracle.exchange import Case, Weights, heads, named
from tests.oracle.fla_decay import HEADS, HIDDEN, SHAPE, convolution
from tests.oracle.fla_in_torch import fla, in_torch

MEMORIES = 4


def of_memories(layer: nn.Module, name: str) -> Tensor:
    """One projection of every memory, ``[H, memories, width, D]``."""
    return torch.stack([heads(projection.weight, HEADS) for projection in getattr(layer, name)], dim=1)


def mom(shared: bool, single: bool = False, **options: Any) -> Case:
    topk = options.get("topk", 2)

    def weights(layer: nn.Module) -> Weights:
        found = named(layer, q="q_proj.weight", g="g_proj.weight", out="o_proj.weight", router="gate.weight")
        found |= named(layer, A_log="A_log", dt_bias="dt_bias", norm_weight="o_norm.weight")
        if shared or single:
            found |= named(layer, **{name: f"shared_{name}.weight" for name in "kvba"})
        if not single:
            found["memory_weight"] = torch.cat([of_memories(layer, f"{name}_proj") for name in "kvab"], 2)
        return found | {"conv_weight": convolution(layer)}

    return Case(
        "mom_gated_deltanet",
        lambda: fla.layers.MomAttention(
            hidden_size=HIDDEN,
            num_heads=HEADS,
            head_dim=HIDDEN // HEADS,
            num_memories=MEMORIES,
            topk=topk,
            shared_mem=shared,
            single_kv_proj=single,
        ),
        weights,
        SHAPE
        | {"expand_v": 2, "num_memories": MEMORIES, "topk": topk}
        | {"shared_memory": shared, "single_projection": single},
        context=in_torch,
        training=False,
    )


CASES = {
    "mom_gated_deltanet": mom(shared=True),
    "mom_gated_deltanet-not_shared": mom(shared=False),
    "mom_gated_deltanet-top3": mom(shared=True, topk=3),
    "mom_gated_deltanet-single": mom(shared=True, single=True),
}

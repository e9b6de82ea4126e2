"""flash-linear-attention's operators (arXiv:2312.06635), called with the same arguments."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linear_moe.bench.kernels.calls import Family, Operator, Shape

WRONG = "result wrong on this compiler"


def why_not() -> str | None:
    """What keeps it from being called here, if anything does."""
    if importlib.util.find_spec("fla") is None:
        return "it is not installed"
    return None if torch.cuda.is_available() else "it needs a GPU"


def place(family: Family) -> tuple[str, str]:
    """Module and name of its operator."""
    folder = "generalized_delta_rule" if family.peer == "dplr_delta_rule" else family.peer
    return f"fla.ops.{folder}", f"chunk_{family.peer}"


def peer(family: Family, shape: Shape) -> Operator:
    """Its operator of a family that it has."""
    module, name = place(family)
    operator = getattr(importlib.import_module(module), name)
    renamed = {"log_decay": _decay_name(family), "bonus": "u"} | (
        {"q": "r"} if family.peer == "rwkv6" else {}
    )
    scale = shape.keys**-0.5

    def run(**named: Tensor) -> Any:
        if family.decay == "head":  # it has no gradient there
            named["log_decay"] = named["log_decay"].detach()
        return operator(**{renamed.get(name, name): x for name, x in named.items()}, scale=scale)

    return run


def arguments(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """It wants int64 offsets."""
    return {name: x.long() if name == "cu_seqlens" else x for name, x in named.items()}


def _decay_name(family: Family) -> str:
    if family.peer == "simple_gla":
        return "g_gamma" if family.decay == "head" else "g"
    return {"rwkv6": "w", "dplr_delta_rule": "gk"}.get(family.peer, "g")


def let_it_run(family: Family) -> str | None:
    """What to write beside its times: it refuses a gated backward pass that its compiler gets wrong on Hopper.

    From here on it does not refuse. For times only: nobody reads the results.
    """
    guarded = importlib.import_module("fla.ops.common.chunk_o")
    if family.decay != "scalar" or not _refuses(guarded):
        return None
    guarded.TRITON_ABOVE_3_7_1 = True  # type: ignore[attr-defined]
    guarded.linear_moe_bypassed = True  # type: ignore[attr-defined]
    return WRONG


def _refuses(guarded: ModuleType) -> bool:
    was_bypassed = hasattr(guarded, "linear_moe_bypassed")
    known = guarded.IS_NVIDIA_HOPPER and guarded.TRITON_ABOVE_3_4_0
    return known and (was_bypassed or not guarded.TRITON_ABOVE_3_7_1)

"""flash-linear-attention's operators (arXiv:2312.06635), called with the same arguments."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linear_moe.bench.kernels.calls import ALL_SHAPES, FAMILIES, Family, Operator, Shape
from linear_moe.bench.kernels.measures import search_path

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


COMPILE = """
import sys
from linear_moe.bench.kernels import calls, peer
import torch
family, shape = calls.FAMILIES[sys.argv[1]], calls.ALL_SHAPES[sys.argv[2]]
peer.let_it_run(family)
named = peer.arguments(calls.inputs(family, shape, torch.bfloat16, "cuda"))
calls.passes(peer.peer(family, shape), named)[1]()
torch.cuda.synchronize()
"""


def compile_ahead(
    families: Sequence[str], shapes: Sequence[str], num_processes: int, is_over: Callable[[], bool]
) -> float:
    """Fill the compile cache from several processes at once, without keeping what they tuned; returns the seconds.

    It compiles every configuration that it times: two to four minutes for each operator, one after the other.
    """
    start = time.monotonic()
    environment = {**os.environ, "FLA_CACHE_RESULTS": "0", "PYTHONPATH": search_path()}
    waiting = _different(families, shapes)
    running: list[subprocess.Popen] = []
    try:
        while (waiting or running) and not is_over():
            running = [process for process in running if process.poll() is None]
            while waiting and len(running) < num_processes:
                command = [sys.executable, "-c", COMPILE, *waiting.pop(0)]
                quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                running.append(subprocess.Popen(command, env=environment, **quiet))  # type: ignore[call-overload]
            time.sleep(0.2)
    finally:
        for process in running:
            process.kill()
            process.wait()
    return time.monotonic() - start


def _different(families: Sequence[str], shapes: Sequence[str]) -> list[tuple[str, str]]:
    """One shape for each that compiles something else."""
    found: dict[Any, tuple[str, str]] = {}
    for name in (name for name in families if FAMILIES[name].peer):
        for shape_name in shapes:
            shape = ALL_SHAPES[shape_name]
            found.setdefault(
                (name, shape.heads, shape.keys, shape.values, bool(shape.documents)), (name, shape_name)
            )
    return list(found.values())

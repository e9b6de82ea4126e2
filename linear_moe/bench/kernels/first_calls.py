"""First calls in processes of their own: how long they take, or to compile ahead in several at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from linear_moe.bench.kernels.calls import ALL_SHAPES, PEER

CALL = """
import sys, time, torch
from linear_moe.bench.kernels import calls, peer
name, shape_name, who = sys.argv[1:]
family, shape = calls.FAMILIES[name], calls.ALL_SHAPES[shape_name]
named, operator = calls.inputs(family, shape, torch.bfloat16, "cuda"), calls.ours(family, shape)
if who == calls.PEER:
    operator, named = peer.peer(family, shape), peer.arguments(named)
    peer.let_it_run(family)
torch.cuda.synchronize()
start = time.perf_counter()
calls.passes(operator, named)[1]()
torch.cuda.synchronize()
print("seconds", time.perf_counter() - start)
"""
"""Forward and backward."""


def seconds_of(family: str, shape: str, who: str, folder: Path) -> dict[str, Any]:
    """Of a first call with an empty compile cache in ``folder``."""
    cache = folder / f"{who}-{family}-{time.time_ns()}".replace(" ", "_")
    environment = _environment(TRITON_CACHE_DIR=str(cache))
    run = subprocess.run(_command(family, shape, who), env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr[-800:])
    return {"seconds": float(run.stdout.split("seconds")[-1])}


def compile_ahead(
    who: str,
    families: Sequence[str],
    shapes: Sequence[str],
    num_processes: int,
    is_over: Callable[[], bool],
) -> float:
    """Fill the compile cache from several processes at once; returns the seconds.

    flash-linear-attention compiles every configuration that it times, two to four minutes for each operator; what it
    chose is not kept.
    """
    start = time.monotonic()
    waiting = _different(who, families, shapes)
    running: list[subprocess.Popen] = []
    try:
        while (waiting or running) and not is_over():
            running = [process for process in running if process.poll() is None]
            while waiting and len(running) < num_processes:
                quiet: dict[str, Any] = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                environment = _environment(FLA_CACHE_RESULTS="0")
                running.append(subprocess.Popen(_command(*waiting.pop(0), who), env=environment, **quiet))
            time.sleep(0.2)
    finally:
        for process in running:
            process.kill()
            process.wait()
    return time.monotonic() - start


def _different(who: str, families: Sequence[str], shapes: Sequence[str]) -> list[tuple[str, str]]:
    """Of flash-linear-attention, one shape for each that compiles something else; ours cuts each in its own way."""
    found: dict[Any, tuple[str, str]] = {}
    for shape_name in shapes:
        shape = ALL_SHAPES[shape_name]
        for name in families:
            kind = (
                (shape.heads, shape.keys, shape.values, bool(shape.documents)) if who == PEER else shape_name
            )
            found.setdefault((name, kind), (name, shape_name))
    return list(found.values())


def _command(family: str, shape: str, who: str) -> list[str]:
    return [sys.executable, "-c", CALL, family, shape, who]


def _environment(**variables: str) -> dict[str, str]:
    """For processes that import what this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}

"""``python -m linear_moe.bench kernels``: are the fused operators right, how fast, how large, how soon ready.

Everything is called through ``linear_moe.kernels``; beside it flash-linear-attention, where it imports (its unpacked
wheels may lie in a folder of PYTHONPATH), softmax attention of PyTorch, and the floor that memory traffic sets. What
fails is a row like any other, and the rest goes on; so does what ``--minutes`` leave no time for. Everything is on disk
after each row, in the place of an older one of the same call, so that a folder can be filled by several commands.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from linear_moe.kernels.dispatch import ENVIRONMENT_VARIABLE

PARTS = {
    "right": "errors against the token loop",
    "time": "milliseconds, and the floor",
    "memory": "peak memory",
    "cold": "seconds of the first call, nothing compiled",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from linear_moe.bench.kernels.calls import ALL_SHAPES, FAMILIES, NAMES

    parser = argparse.ArgumentParser(
        prog="python -m linear_moe.bench kernels",
        description="Measure the fused operators beside flash-linear-attention, softmax attention and the floor.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), help="operators by mixer")
    add("--shapes", nargs="+", choices=list(ALL_SHAPES), help="default: all; tiny ones with --smoke")
    parts = "; ".join(f"{name}: {text}" for name, text in PARTS.items())
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help=parts)
    add(
        "--who", nargs="+", choices=list(NAMES), default=list(NAMES), help="whose time, memory and cold calls"
    )
    add("--minutes", type=float, default=8.0, help="begin nothing after so long")
    add(
        "--sweep",
        action="store_true",
        help="also try the neighbours of every entry of the configuration tables",
    )
    processes = "that compile kernels before they are measured; 0: they are compiled as it goes"
    add("--processes", type=int, default=min(6, (os.cpu_count() or 1) // 3), help=processes)
    add("--cache", type=Path, default=Path("/tmp/linear_moe_cold"), help="of what cold calls compile")
    folder = Path("benchmarks", f"kernels_{time.strftime('%Y-%m-%d')}")
    add("--output", type=Path, default=folder, help="folder of kernels.json, kernels.md and kernels.png")
    add("--smoke", action="store_true", help="tiny sizes, on a CPU too, to see that everything runs")
    return parser


def main(argv: Sequence[str]) -> int:
    """Measure and write the report; returns 0, or 1 when a row of ours failed or is wrong, or 2 for a mistake."""
    given = parser().parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        if not given.smoke:
            sys.stderr.write(
                "linear_moe.bench: there is no CUDA device.\n"
                "  why: the fused kernels are measured on a GPU.\n"
                "  try: --smoke, which runs tiny sizes through Triton's interpreter\n"
            )
            return 2
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    os.environ.setdefault(ENVIRONMENT_VARIABLE, "triton")
    from linear_moe.bench.kernels.session import Session, measure

    command = shlex.join(["python", "-m", "linear_moe.bench", "kernels", *argv])
    session = Session.of(given, command)
    try:
        measure(session)
    finally:
        session.report()
    return int(session.is_bad)

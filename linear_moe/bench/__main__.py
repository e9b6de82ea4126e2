"""``python -m linear_moe.bench COMMAND``: measure, and write tables, JSON and plots.

    step     training steps: speed and memory over mixers and sequence lengths
    kernels  the fused operators beside flash-linear-attention and softmax attention
    decode   seconds per token and memory at ever later positions

``python -m linear_moe.bench COMMAND --help`` has the options. ``kernels`` needs no Megatron.
"""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "step": "linear_moe.bench.step",
    "kernels": "linear_moe.bench.kernels.command",
    "decode": "linear_moe.bench.decode",
}
"""Modules with a ``main``, imported when they are asked for."""


def main(argv: list[str]) -> int:
    """Run a command; returns the exit code."""
    if argv[:1] in (["-h"], ["--help"]):
        sys.stdout.write(__doc__ or "")
        return 0
    if not argv or argv[0] not in COMMANDS:
        sys.stderr.write(
            f"python -m linear_moe.bench: {argv[0] if argv else 'nothing'} is not a command\n"
            f"  why: there is {', '.join(COMMANDS)}\n"
            f"  try: python -m linear_moe.bench {next(iter(COMMANDS))} --help\n"
        )
        return 2
    return import_module(COMMANDS[argv[0]]).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

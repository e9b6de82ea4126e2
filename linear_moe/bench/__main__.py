"""``python -m linear_moe.bench step``: measure training steps, and write tables, JSON and plots."""

from __future__ import annotations

import sys

from linear_moe.bench.step import main as step

COMMANDS = {"step": step}


def main(argv: list[str]) -> int:
    """Run a command; returns the exit code."""
    if not argv or argv[0] not in COMMANDS:
        sys.stderr.write(
            f"python -m linear_moe.bench: {argv[0] if argv else 'nothing'} is not a command\n"
            f"  why: there is {', '.join(COMMANDS)}\n"
            f"  try: python -m linear_moe.bench {next(iter(COMMANDS))} --help\n"
        )
        return 2
    return COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

#!/bin/sh
# Start what the environment describes: what every run script of these folders ends in.
#
#   sh start.sh --family FAMILY [--finetune]
#
# The interpreter is $PYTHON, else that of the repository's own environment.
set -eu

repository=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
: "${PYTHON:=$repository/.venv/bin/python}"
if ! command -v "$PYTHON" >/dev/null; then
    echo "linear_moe: there is no $PYTHON." >&2
    echo "  why: the environment of this repository has not been made yet." >&2
    echo "  try: make -C $repository setup, or PYTHON=<interpreter with megatron-core and torch>" >&2
    exit 2
fi
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m linear_moe.launch "$@"

#!/bin/sh
# Start what the environment describes: what every run script of these folders ends in.
#
#   sh start.sh --family FAMILY [--finetune]
#
# The interpreter is $PYTHON, else that of the repository's own environment.
set -eu

repository=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$repository/scripts/python.sh"
exec "$PYTHON" -m linear_moe.launch "$@"

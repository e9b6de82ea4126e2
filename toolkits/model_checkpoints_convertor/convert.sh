#!/bin/sh
# What the converters of the earlier system do now: convert.sh MG2HF SOURCE TARGET [HF_CKPT_PATH], by tools/convert.py.
# The model's size comes from its config; a checkpoint is read under any TP, PP and EP, so these are set in training.
set -eu
mg2hf=$1 source=$2 target=$3 tokenizer=${4:-}

repository=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
. "$repository/scripts/python.sh"
if [ "$mg2hf" = true ]; then
    set -- export --load "$source" --hf "$target"
    if [ -n "$tokenizer" ] && [ -e "$tokenizer/tokenizer.json" ]; then
        set -- "$@" --tokenizer "$tokenizer"
    fi
else
    set -- import --hf "$source" --save "$target"
fi
echo "python tools/convert.py $*"
exec "$PYTHON" "$repository/tools/convert.py" "$@"

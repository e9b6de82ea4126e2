#!/bin/sh
# hf2mcore_qwen2_convertor.sh MODEL_SIZE SOURCE TARGET TP PP EP PR USE_TE MG2HF [HF_CKPT_PATH], as in the earlier system.
# Used are SOURCE, TARGET, MG2HF (true: our checkpoint -> Hugging Face) and HF_CKPT_PATH (its tokenizer, with MG2HF).
set -eu
if [ $# -lt 3 ]; then exec sh "$(dirname -- "$0")/../too_few.sh" "$0" $#; fi
exec sh "$(dirname -- "$0")/../convert.sh" "${9:-false}" "$2" "$3" "${10:-}"

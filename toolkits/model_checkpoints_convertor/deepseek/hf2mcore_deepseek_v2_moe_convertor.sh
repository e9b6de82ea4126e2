#!/bin/sh
# hf2mcore_deepseek_v2_moe_convertor.sh MODEL_SIZE SOURCE TARGET TP PP EP [PR] MG2HF [HF_CKPT_PATH], as in the earlier system.
# Used are SOURCE, TARGET, MG2HF (true: our checkpoint -> Hugging Face) and HF_CKPT_PATH (its tokenizer, with MG2HF).
set -eu
if [ $# -lt 3 ]; then exec sh "$(dirname -- "$0")/../too_few.sh" "$0" $#; fi
case ${7:-false} in  # later versions have the precision before it
    true | false) exec sh "$(dirname -- "$0")/../convert.sh" "${7:-false}" "$2" "$3" "${8:-}" ;;
    *) exec sh "$(dirname -- "$0")/../convert.sh" "${8:-false}" "$2" "$3" "${9:-}" ;;
esac

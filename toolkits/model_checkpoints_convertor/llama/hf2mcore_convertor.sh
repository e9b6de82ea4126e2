#!/bin/sh
# hf2mcore_convertor.sh MODEL_SIZE HF_CKPT_PATH MEGATRON_PATH SOURCE TARGET TP PP EXTRA_VOCAB_SIZE NUM_EXPERTS TOPK EP \
#     [NUM_EXPERT_SPLITS] MG2HF [WS], as in the earlier system.
# Used are SOURCE, TARGET, MG2HF (true: our checkpoint -> Hugging Face) and HF_CKPT_PATH (its tokenizer, with MG2HF).
set -eu
if [ $# -lt 5 ]; then exec sh "$(dirname -- "$0")/../too_few.sh" "$0" $#; fi
mg2hf=false
for word in "${12:-}" "${13:-}"; do  # some versions have the number of splits before it
    if [ "$word" = true ]; then mg2hf=true; fi
done
exec sh "$(dirname -- "$0")/../convert.sh" "$mg2hf" "$4" "$5" "$2"

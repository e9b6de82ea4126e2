#!/bin/sh
# The earlier name of run_finetune_mcore_llama.sh; gradient accumulation is GLOBAL_BATCH_SIZE over BATCH_SIZE x DP.
exec sh "$(dirname -- "$0")/run_finetune_mcore_llama.sh" "$@"

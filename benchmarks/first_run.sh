#!/usr/bin/env bash
# The first numbers on one GPU: MODEL_SIZE=A0.3B, 20 steps of 16k tokens in bf16, through the run script.
# Side by side: the hybrid with each mixer, softmax everywhere, and the hybrid with Megatron's own loop over experts.
# Usage: bash benchmarks/first_run.sh OUTPUT_FOLDER   (needs a CUDA device; writes OUTPUT_FOLDER/first_run.json)
set -uo pipefail
cd -- "$(dirname -- "$0")/.."
out=$1
: "${PYTHON:=python3}"
runs=$(mktemp -d)
export PYTHON OUTPUT_BASEPATH=$runs MODEL_SIZE=A0.3B SEQ_LEN=2048 PR=bf16 BATCH_SIZE=4 GLOBAL_BATCH_SIZE=8
export DATASET_PATH=mock TRAIN_ITERS=20 WARMUP_ITERS=2 LR=3e-4 MIN_LR=3e-5 SAVE_INTERVAL=0 EVAL_ITERS=0 LOG_INTERVAL=5

run() {  # name, then variables
    name=$1; shift
    env "$@" RUN_NAME="$name" timeout 170 sh examples/linear_moe_qwen2/run_pretrain_qwen.sh >"$runs/$name.log" 2>&1
    echo "$name: exit code $?"
    grep -E "^step|Error|error:" "$runs/$name.log" | tail -n 6
    cp "$runs/$name.log" "$out/$name.log"
}

hybrid=LAYER_TYPE_LIST=LLLNLLLNLLLN
run gated_deltanet-hybrid $hybrid LA_MODULE=gated_deltanet
run gated_deltanet-hybrid-no-recompute $hybrid LA_MODULE=gated_deltanet AC=none
run gla-hybrid $hybrid LA_MODULE=gla AC=none
run linear_attention-hybrid $hybrid LA_MODULE=linear_attention AC=none
run softmax LAYER_TYPE_LIST=N AC=none
run gated_deltanet-hybrid-sequential-experts $hybrid LA_MODULE=gated_deltanet AC=none USE_GEMM=false
"$PYTHON" benchmarks/summarize.py "$runs" --output "$out/first_run.json"

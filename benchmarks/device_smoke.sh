#!/usr/bin/env bash
# First contact with a GPU machine: the tests marked gpu, one short A0.3B run, one profiled. Usage: device_smoke.sh OUT
set -uo pipefail
cd -- "$(dirname -- "$0")/.."
out=$1
: "${PYTHON:=python3}"
export PYTHON
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
timeout 240 "$PYTHON" -m pytest tests -m gpu -q -p no:warnings --timeout 200 2>&1 | tee "$out/gpu_tests.log" | tail -n 25
export MODEL_SIZE=A0.3B SEQ_LEN=2048 PR=bf16 BATCH_SIZE=4 GLOBAL_BATCH_SIZE=8 DATASET_PATH=mock TRAIN_ITERS=8 WARMUP_ITERS=2
export SAVE_INTERVAL=0 EVAL_ITERS=0 LAYER_TYPE_LIST=LLLNLLLNLLLN LA_MODULE=gated_deltanet AC=none OUTPUT_BASEPATH=/tmp/runs
RUN_NAME=smoke timeout 150 sh examples/linear_moe_qwen2/run_pretrain_qwen.sh >"$out/smoke.log" 2>&1
echo "smoke: exit code $?"; grep -E "^step|Error" "$out/smoke.log" | tail -n 10
arguments=$(LINEAR_MOE_DRY_RUN=1 RUN_NAME=profiled sh examples/linear_moe_qwen2/run_pretrain_qwen.sh | tr -d '\\\n' | sed 's/.*linear_moe.training.pretrain//')
# shellcheck disable=SC2086
timeout 150 "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 1 benchmarks/profile_step.py "$out/profile.txt" $arguments >"$out/profile.log" 2>&1
echo "profile: exit code $?"; grep -E "^step|Error" "$out/profile.log" | tail -n 4; cut -c1-72,130-260 "$out/profile.txt" | head -n 46

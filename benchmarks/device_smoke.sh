#!/usr/bin/env bash
# First contact with a GPU machine: the tests marked gpu, and a few steps of A0.3B with their profile.
# Usage: bash benchmarks/device_smoke.sh OUTPUT_FOLDER
set -uo pipefail
cd -- "$(dirname -- "$0")/.."
out=$1
: "${PYTHON:=python3}"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
timeout 420 "$PYTHON" -m pytest tests -m gpu -n 8 -q -p no:warnings --timeout 300 2>&1 | tee "$out/gpu_tests.log" | tail -n 25
timeout 150 "$PYTHON" -m linear_moe.bench step --models gated_deltanet:LLLN --seq-lens 2048 --tokens 16384 --micro-tokens 8192 \
    --warm-up 3 --steps 5 --set AC=none --profile --minutes 2 --output "$out/step"
cat "$out/step/results.md"

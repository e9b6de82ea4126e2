#!/usr/bin/env bash
# All that GPUs are needed for, in calls of less than ten minutes; each leaves its files in OUTPUT_FOLDER.
# Usage: bash benchmarks/gpu_session.sh STAGE OUTPUT_FOLDER [FOLDER_OF_WHEELS]
#   tests     the tests marked gpu, in JOBS=16 processes, which take turns on the GPUs; all but for
#   random    hundreds of random calls, and a trial of each of their kinds
#   kernels   fused operators against definition, softmax attention and the floor
#   peers     flash-linear-attention beside them (its wheels in FOLDER_OF_WHEELS/peers); the same OUTPUT_FOLDER goes on
#   mixers    a step of every mixer at A0.3B, bfloat16 against float32; then the recall table
#   step      tokens/s, MFU and memory over mixers and sequence lengths, with the profile; two micro-batches where
#             64k tokens at once, 105 GiB, do not fit
#   decode    time per token at ever later positions
#   experts   those of one layer, grouped, in a loop and as if dense
#   candidates  kernels that might take the place of shipped ones
#   layouts   two or four GPUs: every kind of layout trains what one GPU does, in float32, over NCCL; MIXERS="rnns or
#             linear" picks stacks, of which one call has time for one or two
#   scaling   two or four GPUs: tokens/s and memory of long sequences in each layout, beside data parallelism alone
# Wheels, where they are not installed: megatron-core, nvidia-cuda-nvcc, pytest-timeout, pytest-xdist and execnet.
set -uo pipefail
cd -- "$(dirname -- "$0")/.."
[ $# -ge 2 ] || { sed -n '1d;/^#/!q;s/^# \{0,1\}//p' "$0" >&2; exit 2; }
stage=$1 out=$2 wheels=${3:-.whl}
if [ -z "${PYTHON:-}" ]; then if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi; fi
install() { # a module and its wheels, where there are some and it does not import
    local place=/tmp/site/$1
    if ! "$PYTHON" -c "import $1" 2>/dev/null && compgen -G "$2/*.whl" >/dev/null; then
        "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$place" "$2"/*.whl || exit
        PYTHONPATH=$place${PYTHONPATH:+:$PYTHONPATH}
    fi
}
install megatron.core "$wheels"
[ "$stage" != peers ] || install fla "$wheels/peers"
export PYTHON PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || exit
case $stage in
tests | random)
    # only files that have such tests: others do not import without flash-linear-attention, and then nothing would run
    drawn=(tests/kernels/test_random_calls.py tests/kernels/test_trial.py)
    mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests | grep -vxF "$(printf '%s\n' "${drawn[@]}")" | sort -r)
    [ "$stage" = tests ] || files=("${drawn[@]}")
    # interrupted, pytest still says what has failed so far
    timeout --foreground -s INT -k 20 530 "$PYTHON" -m pytest "${files[@]}" -m gpu -n "${JOBS:-16}" --maxschedchunk 2 -q --tb=short -p no:warnings --timeout 300 2>&1 |
        tee "$out/gpu_$stage.log" | tail -n 60 ;;
kernels) "$PYTHON" -m linear_moe.bench kernels --who ours torch --processes 14 --minutes 9 --output "$out/kernels" ;;
peers) "$PYTHON" -m linear_moe.bench kernels --who fla --parts time memory --processes 15 --minutes 9 --output "$out/kernels" ;;
mixers)
    timeout 180 "$PYTHON" benchmarks/mixers_step.py "$out/mixers_step.json"
    "$PYTHON" examples/recall/run.py --minutes 6 --processes 6 --results "$out/recall" ;;
step)
    memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -n 1)
    halves=$([ "$memory" -ge 110000 ] || echo "--micro-tokens 32768")
    export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True # 73 to 75 GiB are in use
    # shellcheck disable=SC2086
    "$PYTHON" -m linear_moe.bench step $halves --profile --minutes 9 --output "$out/step" ;;
decode) "$PYTHON" -m linear_moe.bench decode --minutes 8 --output "$out/decode" ;;
experts) timeout 300 "$PYTHON" benchmarks/experts.py "$out/experts.json" ;;
candidates) timeout 570 "$PYTHON" benchmarks/candidates.py "$out/candidates.json" ;;
layouts)
    LINEAR_MOE_WORKERS=cuda timeout --foreground -s INT -k 20 560 "$PYTHON" -m pytest tests/training/test_layouts.py \
        -k "${MIXERS:-hybrid}" -q --tb=short -p no:warnings --timeout 540 --durations 10 2>&1 |
        tee "$out/gpu_layouts.log" | tail -n 60 ;;
scaling)
    export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
    gpus=$(nvidia-smi --list-gpus | wc -l)
    "$PYTHON" -m linear_moe.bench step --models gla softmax --set GPUS_PER_NODE="$gpus" \
        --seq-lens 32768 --tokens $((65536 * gpus)) --micro-tokens 32768 --steps 8 --warm-up 3 \
        --vary CP=2 TP=2 EP=2 PP=2 --minutes 9 --output "$out/scaling" ;;
*) echo "gpu_session.sh: $stage is no stage; see bash gpu_session.sh" >&2; exit 2 ;;
esac

#!/bin/sh
# A small hybrid Linear-MoE from nothing: text, tokenizer, token files, pretraining, a continued prompt, the loss curve.
# The pretraining is the very script a cluster user runs; only its variables are small. `make demo` sets up and calls this.
set -eu
case ${1:-} in
    '') ;;
    -h | --help) echo 'sh scripts/demo.sh' && exec sed -n '2,3s/^# /    /p' "$0" ;;
    *)
        printf 'linear_moe: %s takes no %s.\n  why: variables say what differs.\n' "$0" "$1" >&2
        printf '  try: OUTPUT_BASEPATH=<folder> TRAIN_ITERS=100 sh scripts/demo.sh\n' >&2
        exit 2
        ;;
esac
cd -- "$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)"
repository=$PWD
. scripts/python.sh
: "${OUTPUT_BASEPATH:=runs}"
export PYTHON OUTPUT_BASEPATH
data=$OUTPUT_BASEPATH/demo-data
run=$OUTPUT_BASEPATH/demo

step() { printf '\n== %s\n' "$*"; }

if [ ! -f "$data/python_text_document.idx" ]; then
    step "1/5 text: the library and manual of the Python on this machine"
    "$PYTHON" tools/build_corpus.py "$data/python.jsonl"
    step "2/5 tokenizer: byte-level BPE, 1024 tokens"
    "$PYTHON" tools/train_tokenizer.py --input "$data/python.jsonl" --vocab-size 1024 --output "$data/tokenizer" \
        --overwrite
    step "3/5 token files, in Megatron's format"
    "$PYTHON" tools/preprocess_data.py --input "$data/python.jsonl" --output-prefix "$data/python" \
        --tokenizer "$data/tokenizer" --overwrite
fi

step "4/5 pretraining: three gated_deltanet layers and one of softmax attention, 8 experts each"
# One process; a GPU when there is one. Narrow layers want larger first weights than the default's 0.008.
precision=$("$PYTHON" -c 'from linear_moe.launch.cluster import cuda_device_count as n; print("bf16" if n() else "fp32")')
RUN_NAME=demo MODEL_SIZE=demo LA_MODULE=gated_deltanet LAYER_TYPE_LIST=LLLN \
    DATASET_PATH=$data/python_text_document TOKENIZER=$data/tokenizer \
    SEQ_LEN=256 BATCH_SIZE=8 GLOBAL_BATCH_SIZE=8 LR=3e-3 MIN_LR=3e-4 WARMUP_ITERS=${WARMUP_ITERS:-50} TRAIN_ITERS=${TRAIN_ITERS:-1200} \
    LOG_INTERVAL=25 EVAL_ITERS=0 PR=$precision AC=none GPUS_PER_NODE=1 EXTRA_ARGS="--init-method-std 0.02" \
    sh examples/linear_moe_qwen2/run_pretrain_qwen.sh

step "5/5 what it learned"
"$PYTHON" tools/generate.py --load "$run" --prompt "def read_file(path):" --temperature 0.7 --top-k 40 --seed 1
"$PYTHON" tools/plot_loss.py "$run" --data "$data/python_text_document"

#!/bin/sh
# Score a model with the published harness, lm_eval (docs/evaluate.md): a run, a checkpoint or a Hugging Face folder.
#
#   sh lm_eval_linear_moe.sh runs/mine                        the commonsense tasks of the paper
#   TASKS=recall BATCH_SIZE=32 sh lm_eval_linear_moe.sh runs/mine/checkpoint/iter_0010000
#   TASKS=my_task TASK_PATH=my_tasks sh lm_eval_linear_moe.sh mine-hf
#
# A run is converted once, into RUN/hf/iter_N. What the model is comes from the checkpoint, never from variables.
# LINEAR_MOE_DRY_RUN=1 converts, and prints the command without running it.
set -eu

: "${CHECKPOINT_PATH:=${1:-}}"     # run, its checkpoint/, one iteration in that, or a Hugging Face folder
: "${TASKS:=commonsense}"          # commonsense | recall | all | names of tasks, comma separated
: "${BATCH_SIZE:=16}"              # changes the speed, and no score
: "${MAX_LENGTH:=2048}"            # tokens; longer texts are cut on the left
: "${NUM_FEWSHOT:=}"               # examples before each question; empty: the task's own number
: "${LIMIT:=}"                     # questions of each task; empty: all
: "${DTYPE:=float32}"              # bfloat16 is faster, and its last digits depend on the batch
: "${DEVICE:=}"                    # cuda | cuda:1 | cpu; empty: a GPU if there is one
: "${TASK_PATH:=}"                 # folder with tasks of your own (.yaml)
: "${DATA_PATH:=}"                 # folder with the data sets, an HF_HOME filled where there is a network; then offline
: "${TOKENIZER:=}"                 # folder of the tokenizer, if it has moved since the training
: "${OUTPUT_PATH:=lm_eval_result}" # folder of the results
: "${EXTRA_ARGS:=}"                # anything else, passed to lm_eval as it is

COMMONSENSE=piqa,hellaswag,winogrande,arc_easy,arc_challenge,mmlu,lambada_openai,wikitext
RECALL=fda,swde,squad_completion,nq_open,triviaqa,drop
case $TASKS in
    commonsense) TASKS=$COMMONSENSE ;;
    recall) TASKS=$RECALL ;;
    all) TASKS=$COMMONSENSE,$RECALL ;;
esac

repository=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$repository/scripts/python.sh" # an exported model takes its kernels from here
for name in BASE_MODEL MODEL_SIZE LA_MODULE LAYER_TYPE_LIST HYBRID_OVERRIDE_PATTERN LINEAR_MOE_PATH FLA_PATH; do
    if eval "[ -n \"\${$name:-}\" ]"; then
        echo "linear_moe: $name changes nothing here: the checkpoint says what the model is" >&2
    fi
done

if ! "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("lm_eval") is None)'; then
    echo "linear_moe: lm_eval is not installed
  why: models are scored by the published harness, as it is
  try: $PYTHON -m pip install 'lm-eval[hf]'" >&2
    exit 2
fi
model=$("$PYTHON" "$repository/eval/hugging_face_folder.py" "$CHECKPOINT_PATH" ${TOKENIZER:+--tokenizer "$TOKENIZER"})

# As JSON: lm_eval splits name=value at the commas of a path, and takes its quotes and brackets for its own.
model_args=$("$PYTHON" -c 'import json, sys
path, dtype, length = sys.argv[1:]
print(json.dumps(dict(pretrained=path, trust_remote_code=True, dtype=dtype, max_length=int(length) if length.isdigit() else length)))
' "$model" "$DTYPE" "$MAX_LENGTH")

set -- --model hf --model_args "$model_args"
set -- "$@" --tasks "$TASKS" --batch_size "$BATCH_SIZE" --output_path "$OUTPUT_PATH"
set -- "$@" ${DEVICE:+--device "$DEVICE"} ${NUM_FEWSHOT:+--num_fewshot "$NUM_FEWSHOT"} ${LIMIT:+--limit "$LIMIT"}
set -- "$@" ${TASK_PATH:+--include_path "$TASK_PATH"}
if [ -n "$DATA_PATH" ]; then
    export HF_HUB_CACHE="$DATA_PATH/hub" HF_DATASETS_CACHE="$DATA_PATH/datasets" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
fi
case ${LINEAR_MOE_DRY_RUN:-0} in
    0 | false | no | off) ;;
    *)
        # shellcheck disable=SC2086  # EXTRA_ARGS is several words
        exec "$PYTHON" -c 'import shlex, sys; print(shlex.join(sys.argv[1:]))' "$PYTHON" -m lm_eval "$@" $EXTRA_ARGS
        ;;
esac
# shellcheck disable=SC2086
exec "$PYTHON" -m lm_eval "$@" $EXTRA_ARGS

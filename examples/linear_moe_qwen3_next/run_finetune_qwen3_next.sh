#!/bin/sh
# Finetune a Linear-MoE model of the Qwen3-Next family on instructions: the answers of JSONL conversations are learned.
#
#   PRETRAIN_CHECKPOINT_PATH=output/my-run DATASET_PATH=chats.jsonl sh run_finetune_qwen3_next.sh
#   srun --ntasks-per-node=1 sh run_finetune_qwen3_next.sh               many nodes; SLURM says which
#
# Every variable below can be set from outside, or edited here. An empty one is decided for you: the model is the one of
# the checkpoint. docs/finetune.md has the formats and what is learned; python -m linear_moe.launch --help all variables.
# LINEAR_MOE_DRY_RUN=1 checks everything, prepares the samples and prints the command without running it.
set -eu
set -a # every variable that is set here, yours too, reaches the run

# --- start and samples -----------------------------------------------------------------------------------------------
: "${PRETRAIN_CHECKPOINT_PATH:=}"  # run or checkpoint of any layout, or a Hugging Face folder; none: random weights
: "${DATASET_PATH:=}"              # JSONL: messages, or instruction, input and output
: "${VALID_DATASET_PATH:=}"        # JSONL; empty: no evaluation
: "${TOKENIZER:=}"                 # folder with tokenizer.json; empty: the checkpoint's
: "${CHAT_TEMPLATE:=}"             # file with a Jinja template, or plain; empty: the tokenizer's
: "${SEQ_LEN:=2048}"
: "${OVER_LONG:=drop}"             # samples longer than SEQ_LEN: drop | truncate
: "${PACK:=true}"                  # samples share sequences, and never see each other; false: one a sequence

# --- model: empty ones are those of the checkpoint -------------------------------------------------------------------
: "${MODEL_SIZE:=}"
: "${MOE:=}"
: "${LA_MODULE:=}"
: "${MIXER_MODULES:=}"
: "${LAYER_TYPE_LIST:=}"
: "${HYBRID_OVERRIDE_PATTERN:=}"
: "${BASE_MODEL:=qwen3_next}"
: "${EXTRA_VOCAB_SIZE:=}"
: "${MOE_AUX_LOSS_COEFF:=0.01}"    # load balancing of the experts; 0 turns it off

# --- batch and optimizer ---------------------------------------------------------------------------------------------
: "${BATCH_SIZE:=4}"               # sequences per micro batch and data-parallel rank
: "${GLOBAL_BATCH_SIZE:=}"         # sequences per step; empty: 8, or what the ranks can share
: "${LR:=1e-5}"
: "${MIN_LR:=1e-6}"
: "${PR:=bf16}"                    # bf16 | fp16 | fp32
: "${SEED:=1234}"                  # also of the order of the samples

# --- how long --------------------------------------------------------------------------------------------------------
: "${EPOCHS:=3}"                   # times that every sample is learned
: "${TRAIN_ITERS:=}"               # steps; wins over the other two
: "${TRAIN_TOKENS:=}"              # wins over EPOCHS
: "${WARMUP_ITERS:=}"              # empty: 3 % of the steps
: "${WARMUP_TOKENS:=}"
: "${SAVE_INTERVAL:=}"             # these two: empty: every epoch
: "${EVAL_INTERVAL:=}"
: "${EVAL_ITERS:=}"                # empty: the whole validation set
: "${LOG_INTERVAL:=1}"
: "${VERBOSE:=false}"              # true: show everything Megatron prints; the log has it anyway

# --- layout ----------------------------------------------------------------------------------------------------------
: "${TP:=1}"                       # tensor parallel
: "${PP:=1}"                       # pipeline stages
: "${VPP:=1}"                      # virtual stages per pipeline rank
: "${CP:=1}"                       # context parallel
: "${EP:=1}"                       # expert parallel
: "${ETP:=}"                       # tensor parallel inside experts; empty: TP
: "${SP:=false}"                   # sequence parallel; always on for experts with TP > 1
: "${DO:=true}"                    # distributed optimizer

# --- memory and kernels ----------------------------------------------------------------------------------------------
: "${AC:=sel}"                     # recompute activations: sel | full | none
: "${TE:=auto}"                    # Transformer Engine: auto | true | false
: "${USE_GEMM:=true}"              # grouped GEMM for the experts
: "${TOKEN_DROPPING:=false}"
: "${TRAIN_CAPACITY_FACTOR:=1.25}" # with TOKEN_DROPPING

# --- where it runs ---------------------------------------------------------------------------------------------------
: "${GPUS_PER_NODE:=}"             # processes per node; empty: all GPUs, or one process on CPU
: "${NNODES:=}"                    # these four: from SLURM under srun
: "${NODE_RANK:=}"
: "${MASTER_ADDR:=}"
: "${MASTER_PORT:=}"

# --- where it goes ---------------------------------------------------------------------------------------------------
: "${OUTPUT_BASEPATH:=output}"     # the run lives in OUTPUT_BASEPATH/RUN_NAME; starting it again resumes it
: "${RUN_NAME:=}"                  # empty: finetune-, then family, size, mixers and pattern
: "${EXTRA_ARGS:=}"                # anything else, passed to Megatron as it is

start=$(dirname -- "$0")/../start.sh
[ -f "$start" ] || start=${LINEAR_MOE_START:?is not set, and this is a copy (sbatch makes one): <repository>/examples/start.sh}
exec sh "$start" --family qwen3_next --finetune "$@"

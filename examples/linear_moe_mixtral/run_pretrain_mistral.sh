#!/bin/sh
# Pretrain a Linear-MoE model of the Mixtral family with Megatron: on a laptop, on one node, on a cluster.
#
#   sh run_pretrain_mistral.sh                                        try it: generated data, no file needed
#   TP=2 LA_MODULE=gla LAYER_TYPE_LIST=LLLN sh run_pretrain_mistral.sh
#   srun --ntasks-per-node=1 sh run_pretrain_mistral.sh               many nodes; SLURM says which
#
# Every variable below can be set from outside, or edited here. An empty one is decided for you: those of the
# model by PRETRAIN_CHECKPOINT_PATH, if that is a run or a Hugging Face folder.
# All variables with their meaning: python -m linear_moe.launch --help
# LINEAR_MOE_DRY_RUN=1 checks everything and prints the command without running it.
set -eu
set -a # every variable that is set here, yours too, reaches the run

# --- model -----------------------------------------------------------------------------------------------------------
: "${MODEL_SIZE:=}"                # Small (if empty) | 8x7B (the earlier 7B) | tiny
: "${MOE:=}"                       # true: experts in a dense size; false: no experts; empty: as the size is
: "${LA_MODULE:=}"                 # mixer of the L layers (empty: gated_deltanet); python -m linear_moe.lsm lists them
: "${MIXER_MODULES:=}"             # your modules that register more mixers (docs/new_mixer.md)
: "${LAYER_TYPE_LIST:=}"           # one symbol per layer: L linear, N softmax; LLLN repeats; empty: L everywhere
: "${HYBRID_OVERRIDE_PATTERN:=}"   # the other spelling: M mamba2, * softmax
: "${BASE_MODEL:=mixtral}"
: "${EXTRA_VOCAB_SIZE:=}"          # embedding rows above the tokenizer's; empty: the size's own number
: "${MOE_AUX_LOSS_COEFF:=0.01}"    # load balancing of the experts; 0 turns it off

# --- data ------------------------------------------------------------------------------------------------------------
: "${DATASET_PATH:=mock}"          # prefix of .bin/.idx, or a blend "0.3 prefix1 0.7 prefix2", or mock
: "${TOKENIZER:=}"                 # folder with tokenizer.json; null: numbers without text (empty with mock: null)
: "${VOCAB_SIZE:=}"                # with TOKENIZER=null
: "${SEQ_LEN:=2048}"
: "${PACK:=false}"                 # true: documents in one sequence never see each other

# --- batch and optimizer ---------------------------------------------------------------------------------------------
: "${BATCH_SIZE:=4}"               # sequences per micro batch and data-parallel rank
: "${GLOBAL_BATCH_SIZE:=}"         # sequences per step; empty: 8, or what the ranks can share
: "${LR:=1e-4}"
: "${MIN_LR:=1e-5}"
: "${PR:=bf16}"                    # bf16 | fp16 | fp32
: "${SEED:=1234}"

# --- how long --------------------------------------------------------------------------------------------------------
: "${TRAIN_TOKENS:=15000000000}"
: "${TRAIN_ITERS:=}"               # wins over TRAIN_TOKENS
: "${WARMUP_TOKENS:=10000}"        # at least one step
: "${WARMUP_ITERS:=}"              # wins over WARMUP_TOKENS
: "${SAVE_INTERVAL:=100000}"
: "${EVAL_INTERVAL:=100000}"
: "${EVAL_ITERS:=10}"
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
: "${RUN_NAME:=}"                  # empty: made from family, size, mixers and pattern
: "${PRETRAIN_CHECKPOINT_PATH:=none}" # weights to start from: run or checkpoint of any layout, or a Hugging Face folder
: "${EXTRA_ARGS:=}"                # anything else, passed to Megatron as it is

start=$(dirname -- "$0")/../start.sh
[ -f "$start" ] || start=${LINEAR_MOE_START:?is not set, and this is a copy (sbatch makes one): <repository>/examples/start.sh}
exec sh "$start" --family mixtral "$@"

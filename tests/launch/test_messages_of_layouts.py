"""What a person reads about sizes that cannot be divided as asked: over processes, stages, experts, nodes, batches."""

import pytest

from tests.launch.plans import case, message

CASES = [
    case(
        "heads",
        """tensor parallel 3 does not fit qwen2 tiny.
  why: TP has to divide 4 heads and the feed-forward width 64, and to fit 4 key/value groups.
  try: TP=4 (legal: 1, 2, 4)""",
        TP="3",
        GPUS_PER_NODE="3",
    ),
    case(
        "expert_tensor_parallel",
        """ETP=3 does not fit qwen2 tiny.
  why: it has to divide the width of an expert, 64.
  try: ETP=4, or ETP= (empty): TP""",
        ETP="3",
    ),
    case(
        "groups_of_heads",
        """4 heads of qwen2 tiny do not make 3 equal groups.
  why: the softmax layers share each key and value among the heads of a group.
  try: EXTRA_ARGS='--num-attention-heads 4 --num-query-groups 4'""",
        EXTRA_ARGS="--num-query-groups 3",
        LAYER_TYPE_LIST="LN",
    ),
    case(
        "channels_in_pairs",
        """a head of qwen2 tiny has 3 channels, 3 of them with positions.
  why: rotary positions of softmax layers turn channels in pairs.
  try: EXTRA_ARGS='--kv-channels 4'""",
        EXTRA_ARGS="--kv-channels 3",
        LAYER_TYPE_LIST="N",
    ),
    case(
        "heads_too_many",
        """tensor parallel 8 does not fit qwen2 tiny.
  why: TP has to divide 4 heads and the feed-forward width 64, and to fit 4 key/value groups.
  try: TP=4 (legal: 1, 2, 4)""",
        TP="8",
        GPUS_PER_NODE="8",
    ),
    case(
        "stages",
        """4 layers do not cut into PP 3 = 3 equal stages: LL|LN|!
  why: every stage holds the same number of layers.
  try: PP=4 (legal: 1, 2, 4)""",
        PP="3",
        GPUS_PER_NODE="3",
        LAYER_TYPE_LIST="LLLN",
    ),
    case(
        "virtual_stages",
        """4 layers do not cut into PP 2 x VPP 3 = 6 equal stages: L|L|L|L|!|!
  why: every stage holds the same number of layers.
  try: PP=1 (legal: 1), or VPP=1""",
        PP="2",
        VPP="3",
        GPUS_PER_NODE="2",
    ),
    case(
        "virtual_without_pipeline",
        """VPP=2 needs a pipeline, but PP=1.
  why: virtual stages interleave the pipeline stages of several ranks.
  try: PP=2 VPP=2, or VPP=1""",
        VPP="2",
    ),
    case(
        "sequence_cp",
        """SEQ_LEN=130 is not divisible by 4.
  why: softmax layers cut each sequence into 2 x CP = 4 chunks.
  try: SEQ_LEN=132 or SEQ_LEN=128""",
        CP="2",
        SEQ_LEN="130",
        GPUS_PER_NODE="2",
    ),
    case(
        "sequence_cp_and_sp",
        """SEQ_LEN=132 is not divisible by 8.
  why: softmax layers cut each sequence into 2 x CP = 4 chunks, and sequence parallel cuts it over TP = 2.
  try: SEQ_LEN=136 or SEQ_LEN=128""",
        TP="2",
        CP="2",
        SEQ_LEN="132",
        GPUS_PER_NODE="4",
    ),
    case(
        "sequence_too_long",
        """SEQ_LEN=200000 is longer than qwen2 allows.
  why: its positions end at 131072.
  try: SEQ_LEN=131072, or EXTRA_ARGS='--max-position-embeddings 200000'""",
        SEQ_LEN="200000",
    ),
    case(
        "experts",
        """8 experts cannot be dealt out to EP=3.
  why: every rank holds the same number of experts.
  try: EP=4 (legal: 1, 2, 4, 8)""",
        EP="3",
        GPUS_PER_NODE="3",
    ),
    case(
        "experts_of_a_dense_model",
        """EP=2, but qwen2 tiny-dense has no experts.
  why: expert parallel deals out the experts of a mixture.
  try: EP=1""",
        MODEL_SIZE="tiny-dense",
        EP="2",
        GPUS_PER_NODE="2",
    ),
    case(
        "experts_on_cpu",
        """EP=2 with ETP=2 does not run on CPU.
  why: gloo cannot gather tensors of different sizes, which the token dispatcher needs here.
  try: ETP=1""",
        TP="2",
        EP="2",
        ETP="2",
        GPUS_PER_NODE="4",
    ),
    case(
        "router_visits_more_than_there_are",
        """a token cannot visit 20 of 8 experts.
  why: each of those that it visits is another one.
  try: EXTRA_ARGS='--moe-router-topk 8' or less, or more experts with --num-experts""",
        EXTRA_ARGS="--moe-router-topk 20",
    ),
    case(
        "router_of_fewer_experts",
        """a token cannot visit 2 of 1 experts.
  why: each of those that it visits is another one.
  try: EXTRA_ARGS='--moe-router-topk 1' or less, or more experts with --num-experts""",
        EXTRA_ARGS="--num-experts 1",
    ),
    case(
        "router_of_groups",
        """a token cannot visit 5 of 4 experts in the 2 groups open to it.
  why: each of those that it visits is another one.
  try: EXTRA_ARGS='--moe-router-topk 4' or less, or more experts with --num-experts""",
        EXTRA_ARGS="--moe-router-topk 5 --moe-router-num-groups 4 --moe-router-group-topk 2",
    ),
    case(
        "router_of_unequal_groups",
        """8 experts do not make 3 equal groups.
  why: the router of qwen2 tiny chooses groups, then experts in these.
  try: EXTRA_ARGS='--num-experts 9', or another --moe-router-num-groups""",
        EXTRA_ARGS="--moe-router-num-groups 3 --moe-router-group-topk 2",
    ),
    case(
        "capacity_of_nothing",
        """TRAIN_CAPACITY_FACTOR=0 drops every token.
  why: an expert takes that many times its even share of the tokens.
  try: TRAIN_CAPACITY_FACTOR=1.25, or TOKEN_DROPPING=false""",
        TOKEN_DROPPING="true",
        TRAIN_CAPACITY_FACTOR="0",
    ),
    case(
        "capacity_of_a_dense_model",
        """TOKEN_DROPPING=true, but qwen2 tiny has no experts.
  why: it is experts that drop tokens for which they have no room.
  try: TOKEN_DROPPING=false, or a model with experts (MOE, MODEL_SIZE)""",
        MOE="false",
        TOKEN_DROPPING="true",
    ),
    case(
        "world",
        """1 node(s) x 6 = 6 process(es) cannot hold TP 2 x PP 2 x CP 1 = 4.
  why: the number of processes has to be a multiple of that product; what is left over is data parallel.
  try: GPUS_PER_NODE=4, or a smaller TP, PP or CP""",
        TP="2",
        PP="2",
        GPUS_PER_NODE="6",
    ),
    case(
        "world_too_small",
        """1 node(s) x 1 = 1 process(es) cannot hold TP 2 x PP 1 x CP 1 = 2.
  why: the number of processes has to be a multiple of that product; what is left over is data parallel.
  try: GPUS_PER_NODE=2, or a smaller TP, PP or CP""",
        TP="2",
    ),
    case(
        "world_of_experts",
        """1 node(s) x 2 = 2 process(es) cannot hold ETP 2 x EP 4 x PP 1 = 8.
  why: the experts are laid out over the same processes, and need a whole number of copies.
  try: EP=1, or NNODES=4, or GPUS_PER_NODE=8 on one node""",
        cuda=8,
        TP="2",
        EP="4",
        GPUS_PER_NODE="2",
    ),
    case(
        "devices",
        """GPUS_PER_NODE=8, but this node has 4 CUDA device(s).
  why: every process needs a device of its own.
  try: GPUS_PER_NODE=4, or CUDA_VISIBLE_DEVICES= (empty) to run 8 processes on CPU""",
        cuda=4,
        GPUS_PER_NODE="8",
    ),
    case(
        "nodes_without_address",
        """NNODES=2, but MASTER_ADDR is not set.
  why: the nodes meet at the address of node 0.
  try: MASTER_ADDR=<host of node 0> NODE_RANK=<number of this node>, or srun --ntasks-per-node=1""",
        NNODES="2",
    ),
    case(
        "no_port",
        """MASTER_PORT=99999999 is no port.
  why: the numbers of ports end at 65535.
  try: MASTER_PORT=29500""",
        MASTER_PORT="99999999",
    ),
    case(
        "node_rank",
        """NODE_RANK=1, but NNODES=1.
  why: nodes are numbered from 0.
  try: NODE_RANK=0, or NNODES=2""",
        NODE_RANK="1",
    ),
    case(
        "global_batch",
        """GLOBAL_BATCH_SIZE=6 is not divisible by BATCH_SIZE 4 x DP 1 = 4.
  why: every data-parallel rank takes whole micro batches of 4 sequences.
  try: GLOBAL_BATCH_SIZE=8, or BATCH_SIZE=1""",
        GLOBAL_BATCH_SIZE="6",
    ),
    case(
        "interleaved_batches",
        """3 micro batches a step do not interleave over PP=2 with VPP=2.
  why: the interleaved schedule handles micro batches in groups of PP.
  try: GLOBAL_BATCH_SIZE=16, or VPP=1""",
        PP="2",
        VPP="2",
        GPUS_PER_NODE="2",
        GLOBAL_BATCH_SIZE="12",
    ),
    case(
        "slurm_without_srun",
        """this SLURM job has 2 nodes, but the script runs on the first one only.
  why: one copy of the script has to run on each node, and `srun` is what starts it there.
  try: srun --ntasks-per-node=1 sh <this script>, or NNODES=1 to use this node alone""",
        SLURM_PROCID="0",
        SLURM_JOB_NUM_NODES="2",
    ),
    case(
        "slurm_tasks",
        """srun started 16 tasks on 2 node(s).
  why: the script starts the processes of its node itself, GPUS_PER_NODE of them.
  try: srun --ntasks-per-node=1 sh <this script>""",
        SLURM_PROCID="1",
        SLURM_STEP_ID="0",
        SLURM_STEP_NUM_NODES="2",
        SLURM_STEP_NUM_TASKS="16",
    ),
    case(
        "under_torchrun",
        """this script was started as process 3 of 16 (RANK, WORLD_SIZE).
  why: it starts the processes of its node itself, with torchrun.
  try: sh <this script> without torchrun, once on each node""",
        WORLD_SIZE="16",
        RANK="3",
        LOCAL_RANK="3",
        MASTER_ADDR="host",
    ),
    case(
        "a_pod_of_two",
        """WORLD_SIZE=2 and RANK=1 speak of other nodes, and NNODES of none.
  why: each node would train a run of its own; a service sets the former, of its pods or of all their processes.
  try: NNODES=<number of nodes> NODE_RANK=1 (one start on each), or NNODES=1 to use this node alone""",
        WORLD_SIZE="2",
        RANK="1",
        MASTER_ADDR="host",
    ),
]


@pytest.mark.parametrize(("cuda", "variables", "text"), CASES)
def test_message(cuda: int, variables: dict[str, str], text: str):
    assert message(cuda, **variables) == text


NO_FEED_FORWARD = {
    "experts_as_wide_as_nothing": (
        """MOE=true, but mamba2 tiny has no feed-forward blocks.
  why: experts are as wide as the blocks that they stand for.
  try: EXTRA_ARGS='--num-experts 8 --moe-ffn-hidden-size 256', or MOE= (empty)""",
        {"MOE": "true"},
    ),
    "experts_without_a_width": (
        """the 4 experts of mamba2 tiny have no width.
  why: without one of their own it is that of the feed-forward blocks, which this model has not.
  try: EXTRA_ARGS='--num-experts 4 --moe-ffn-hidden-size 256'""",
        {"EXTRA_ARGS": "--num-experts 4"},
    ),
    "heads_only": (
        """tensor parallel 3 does not fit mamba2 tiny.
  why: TP has to divide 4 heads, and to fit 4 key/value groups.
  try: TP=4 (legal: 1, 2, 4)""",
        {"TP": "3", "GPUS_PER_NODE": "3"},
    ),
}


@pytest.mark.parametrize("name", NO_FEED_FORWARD)
def test_message_of_a_family_without_feed_forward_blocks(name: str):
    text, variables = NO_FEED_FORWARD[name]
    assert message(family="mamba2", **variables) == text

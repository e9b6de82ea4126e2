"""Every mistake of the variables, and exactly what a person reads about it: what, why, what to type."""

import pytest

from linear_moe.launch.plan import registered_mixers
from tests.launch.plans import message


def case(name: str, text: str, cuda: int = 0, **variables: str):
    return pytest.param(cuda, variables, text, id=name)


CASES = [
    case(
        "mixer_misspelt",
        """unknown mixer 'gatd_deltanet'; the nearest name is 'gated_deltanet'.
  why: the registered mixers are <mixers>.
  try: LA_MODULE=gated_deltanet""",
        LA_MODULE="gatd_deltanet",
    ),
    case(
        "mixer_of_another_version",
        """unknown mixer 'mega'; the nearest name is 'gsa'.
  why: the registered mixers are <mixers>.
  try: LA_MODULE=gsa""",
        LA_MODULE="mega",
    ),
    case(
        "second_mixer_unknown",
        """unknown mixer 'glaa'; the nearest name is 'gla'.
  why: the registered mixers are <mixers>.
  try: LA_MODULE=gla""",
        LA_MODULE="gla,glaa",
    ),
    case(
        "symbol_unknown",
        """unknown layer symbol 'x' at position 3 of LAYER_TYPE_LIST=LLxN.
  why: the symbols are L = gated_deltanet, N = softmax.
  try: LAYER_TYPE_LIST='LLLN'""",
        LAYER_TYPE_LIST="LLxN",
    ),
    case(
        "symbol_lower_case",
        """unknown layer symbol 'n' at position 4 of LAYER_TYPE_LIST=LLLn.
  why: the symbols are L = gated_deltanet, N = softmax.
  try: LAYER_TYPE_LIST='LLLN'""",
        LAYER_TYPE_LIST="LLLn",
    ),
    case(
        "symbols_with_spaces",
        """unknown layer symbol ' ' at position 2 of LAYER_TYPE_LIST=L L L N.
  why: the symbols are L = gated_deltanet, N = softmax.
  try: LAYER_TYPE_LIST='LLLN'""",
        LAYER_TYPE_LIST="L L L N",
    ),
    case(
        "size_in_capitals",
        """unknown MODEL_SIZE=TINY of qwen2.
  why: the sizes are 0.5B, 1.5B, 7B, 72B, A0.3B, A1B, A14B, tiny, tiny-dense, demo.
  try: MODEL_SIZE=tiny""",
        MODEL_SIZE="TINY",
    ),
    case(
        "symbol_of_the_other_pattern",
        """unknown layer symbol '*' at position 4 of LAYER_TYPE_LIST=LLL*.
  why: the symbols are L = gated_deltanet, N = softmax.
  try: LAYER_TYPE_LIST='LLLN'""",
        LAYER_TYPE_LIST="LLL*",
    ),
    case(
        "symbol_without_its_mixer",
        """layer symbol '2' at position 2 of LAYER_TYPE_LIST=L2LN names no mixer.
  why: it stands for mixer 2 of LA_MODULE=gated_deltanet.
  try: LA_MODULE=gated_deltanet,another""",
        LAYER_TYPE_LIST="L2LN",
    ),
    case(
        "pattern_does_not_divide",
        """LAYER_TYPE_LIST=LLN (3 symbols) does not fit 4 layers.
  why: a shorter pattern is repeated, but 3 symbols do not divide 4 layers.
  try: LAYER_TYPE_LIST='LLNL' (4 symbols), or LAYER_TYPE_LIST='LL' (repeated 2 x)""",
        LAYER_TYPE_LIST="LLN",
    ),
    case(
        "pattern_too_long",
        """LAYER_TYPE_LIST=LLLLLLLN (8 symbols) does not fit 4 layers.
  why: the pattern has 8 symbols and the model 4 layers; it needs one symbol per layer.
  try: LAYER_TYPE_LIST='LLLL' (4 symbols)""",
        LAYER_TYPE_LIST="LLLLLLLN",
    ),
    case(
        "pattern_against_changed_layers",
        """LAYER_TYPE_LIST=LLLN (4 symbols) does not fit 6 layers.
  why: a shorter pattern is repeated, but 4 symbols do not divide 6 layers.
  try: LAYER_TYPE_LIST='LLLNLL' (6 symbols), or LAYER_TYPE_LIST='LLL' (repeated 2 x)""",
        LAYER_TYPE_LIST="LLLN",
        EXTRA_ARGS="--num-layers 6",
    ),
    case(
        "hybrid_dash",
        """unknown layer symbol '-' at position 2 of HYBRID_OVERRIDE_PATTERN=M-M*.
  why: a symbol is a whole layer with its feed-forward block; the symbols are M = mamba2, * = softmax.
  try: HYBRID_OVERRIDE_PATTERN='MM*'""",
        HYBRID_OVERRIDE_PATTERN="M-M*",
    ),
    case(
        "two_patterns",
        """LAYER_TYPE_LIST=LLLN and HYBRID_OVERRIDE_PATTERN=**** describe two different models.
  why: the first gives 3 gated_deltanet + 1 softmax, the second 4 softmax.
  try: HYBRID_OVERRIDE_PATTERN= (empty), or LAYER_TYPE_LIST= (empty)""",
        LAYER_TYPE_LIST="LLLN",
        HYBRID_OVERRIDE_PATTERN="****",
    ),
    case(
        "size_unknown",
        """unknown MODEL_SIZE=A03B of qwen2.
  why: the sizes are 0.5B, 1.5B, 7B, 72B, A0.3B, A1B, A14B, tiny, tiny-dense, demo.
  try: MODEL_SIZE=A0.3B""",
        MODEL_SIZE="A03B",
    ),
    case(
        "other_family",
        """BASE_MODEL=llama3, but this script trains qwen2.
  why: every family has its own script, and the script decides.
  try: BASE_MODEL=qwen2""",
        BASE_MODEL="llama3",
    ),
    case(
        "not_a_number",
        """TP=two is not a whole number, 1 or more.
  why: Tensor parallel size: heads and feed-forward widths are cut.
  try: TP=1""",
        TP="two",
    ),
    case(
        "not_whole",
        """TRAIN_ITERS=1.5 is not a whole number, 1 or more.
  why: Steps to train. Not set: TRAIN_TOKENS / GLOBAL_BATCH_SIZE / SEQ_LEN, rounded up.
  try: TRAIN_ITERS=100""",
        TRAIN_ITERS="1.5",
    ),
    case(
        "not_a_choice",
        """PR=fp8 is not one of fp32, bf16, fp16.
  why: Precision of weights and activations; gradients and optimizer are always fp32.
  try: PR=bf16""",
        PR="fp8",
    ),
    case(
        "not_a_bool",
        """DO=maybe is not true or false.
  why: Distributed optimizer: its state is cut over data-parallel ranks.
  try: DO=true""",
        DO="maybe",
    ),
    case(
        "not_a_bool_nor_empty",
        """MOE=maybe is not true or false.
  why: Experts: true gives a dense size 8 of them, top-2; false leaves them out. Not set: as the size is.
  try: MOE=true""",
        MOE="maybe",
    ),
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
        "warmup",
        """the warm-up takes 10 steps and the run 10.
  why: the learning rate has to reach LR and come down again.
  try: WARMUP_ITERS=1""",
        WARMUP_ITERS="10",
    ),
    case(
        "min_lr",
        """MIN_LR=1.0 is above LR=0.0001.
  why: the cosine falls from LR to MIN_LR.
  try: MIN_LR=1e-05""",
        MIN_LR="1",
    ),
    case(
        "extra_args_layout",
        """EXTRA_ARGS holds --tensor-model-parallel-size, which TP sets.
  why: the checks before the start read the variables; a second value would get past them.
  try: TP=...""",
        EXTRA_ARGS="--tensor-model-parallel-size 2",
    ),
    case(
        "extra_args_capacity",
        """EXTRA_ARGS holds --moe-expert-capacity-factor, which TOKEN_DROPPING sets.
  why: the checks before the start read the variables; a second value would get past them.
  try: TOKEN_DROPPING=true TRAIN_CAPACITY_FACTOR=...""",
        EXTRA_ARGS="--moe-expert-capacity-factor -1",
    ),
    case(
        "extra_args_of_another_mixer",
        """EXTRA_ARGS holds --gla-gate-rank, but no layer is gla.
  why: the layers are mom_gla, softmax; the option would change nothing.
  try: leave it out, or --mom-gla-gate-rank if there is such an option""",
        EXTRA_ARGS="--mom-gla-expand-k 1 --mom-topk 2 --gla-gate-rank=32",
        LA_MODULE="mom_gla",
        LAYER_TYPE_LIST="LN",
    ),
    case(
        "extra_args_size",
        """--num-layers -3 of EXTRA_ARGS is not a positive number.
  why: it is a size of the model.
  try: --num-layers 8""",
        EXTRA_ARGS="--num-layers -3",
    ),
    case(
        "extra_args_of_latent_attention",
        """EXTRA_ARGS holds --kv-lora-rank, which changes nothing here.
  why: it is of latent attention, which this family has not.
  try: leave it out""",
        EXTRA_ARGS="--kv-lora-rank 512",
    ),
    case(
        "extra_args_of_experts",
        """EXTRA_ARGS holds --moe-router-topk, which changes nothing here.
  why: it is of experts, which this model has not.
  try: leave it out, or --num-experts 8 with it""",
        EXTRA_ARGS="--moe-router-topk 2",
        MODEL_SIZE="tiny-dense",
    ),
    case(
        "experts_of_every_second_layer",
        """--moe-layer-freq 2 of EXTRA_ARGS is no number of dense layers before those with experts.
  why: a model keeps that number alone, and this one has 4 layers, with experts.
  try: EXTRA_ARGS='--moe-layer-freq ([0]*1+[1]*3)' for one""",
        EXTRA_ARGS="--moe-layer-freq 2",
    ),
    case(
        "seed_too_large",
        """SEED=4294967296 is not a whole number, from 0 to 2147483647.
  why: Seed of weights, data order and dropout.
  try: SEED=1234""",
        SEED="4294967296",
    ),
    case(
        "extra_args_quotes",
        """EXTRA_ARGS=--x 'y cannot be split.
  why: No closing quotation.
  try: close the quotes""",
        EXTRA_ARGS="--x 'y",
    ),
    case(
        "transformer_engine",
        """TE=true, but Transformer Engine is not installed.
  why: it is optional: everything also runs without it.
  try: TE=auto, or pip install -e '.[te]' in the repository""",
        TE="true",
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
]


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


OF_MIXERS = {
    "--la-conv-size is -1": {"EXTRA_ARGS": "--la-conv-size -1"},
    "--gated-deltanet-conv-size is -1": {"EXTRA_ARGS": "--gated-deltanet-conv-size -1 --la-conv-size 4"},
    "--la-conv-size is '2.5'": {"EXTRA_ARGS": "--la-conv-size=2.5"},
    "EXTRA_ARGS: argument --gated-deltanet-conv-size: invalid int value: 'x'.": {
        "EXTRA_ARGS": "--weight-decay 0.2 --gated-deltanet-conv-size x"
    },
    "EXTRA_ARGS: no mixer has the option --gated-deltanet-foo.": {"EXTRA_ARGS": "--gated-deltanet-foo 3"},
    "--expand-v 1.7 gives a head of 54.4 channels": {"EXTRA_ARGS": "--expand-v 1.7"},
    "a memory of gated_deltanet is 1024 channels wide": {"EXTRA_ARGS": "--expand-v 32"},
    "--la-feature-map is set, but no layer of this model has feature_map": {
        "EXTRA_ARGS": "--la-feature-map elu"
    },
    "rwkv7 does not train with full recomputation of layers": {"LA_MODULE": "rwkv7", "AC": "full"},
    "the 1 heads of mamba2 cannot be divided over tensor parallel size 2": {
        "LA_MODULE": "mamba2", "EXTRA_ARGS": "--mamba2-ssm-head-dim 256", "TP": "2", "GPUS_PER_NODE": "2",
    },
    "mom_gla has a capacity, which context parallelism does not know": {
        "LA_MODULE": "mom_gla", "EXTRA_ARGS": "--mom-capacity 1.5", "CP": "2", "GPUS_PER_NODE": "2",
    },
}  # fmt: skip


@pytest.mark.parametrize("what", OF_MIXERS)
def test_message_of_a_mixer(what: str):
    lines = message(**OF_MIXERS[what]).splitlines()
    assert lines[0] == what and lines[1].startswith("  why: ") and lines[2].startswith("  try: ")


def test_what_to_type_about_an_option_is_its_flag():
    assert message(EXTRA_ARGS="--la-conv-size=-1") == (
        "--la-conv-size is -1\n"
        "  why: it is the number of tokens that the short convolution sees, itself included\n"
        "  try: --la-conv-size 4, or 0 for none"
    )
    assert message(LA_MODULE="mamba2", EXTRA_ARGS="--mamba2-dt-limit-min 3 --mamba2-dt-limit-max 1") == (
        "--mamba2-dt-limit-max is 1.0\n"
        "  why: it must be above --mamba2-dt-limit-min 3.0, or dt would not depend on the token\n"
        "  try: --mamba2-dt-limit-max 0.1, or leave it out"
    )


def test_mixers_that_can_be_made_have_no_message():
    divided = {"TP": "2", "CP": "2", "GPUS_PER_NODE": "4", "AC": "full"}
    options = "--gla-gate-rank 8 --weight-decay 0 --la-conv-size 4 --mom-shared-memory --log-params-norm"
    assert message(LA_MODULE="gla,mom_deltanet", LAYER_TYPE_LIST="12N1", EXTRA_ARGS=options, **divided) == ""
    assert message(LA_MODULE="rwkv7", LAYER_TYPE_LIST="LNNN", AC="full") == "", "nobody needs its first value"


@pytest.mark.parametrize(("cuda", "variables", "text"), CASES)
def test_message(cuda: int, variables: dict[str, str], text: str):
    mixers = ", ".join(sorted((*registered_mixers(), "softmax")))
    assert message(cuda, **variables) == text.replace("<mixers>", mixers)


def test_a_correct_run_has_no_message():
    assert message() == ""
    assert message(EXTRA_ARGS="--ffn-hidden-size 0", MODEL_SIZE="tiny-dense") == "", "no feed-forward blocks"
    assert message(EXTRA_ARGS="--num-query-groups 3 --kv-channels 3") == "", "no layer is softmax attention"
    assert (
        message(cuda=8, TP="2", PP="2", CP="1", EP="2", LAYER_TYPE_LIST="LLLN", GLOBAL_BATCH_SIZE="16") == ""
    )

"""Mistakes of the variables, and what a person reads: what, why, what to type. (Of mixers, of layouts: beside.)"""

import pytest

from tests.launch.plans import case, message

CASES = [
    case(
        "size_in_capitals",
        """unknown MODEL_SIZE=TINY of qwen2.
  why: the sizes are 0.5B, 1.5B, 7B, 72B, A0.3B, A1B, A14B, tiny, tiny-dense, demo.
  try: MODEL_SIZE=tiny""",
        MODEL_SIZE="TINY",
    ),
    case(
        "size_unknown",
        """unknown MODEL_SIZE=A03B of qwen2.
  why: the sizes are 0.5B, 1.5B, 7B, 72B, A0.3B, A1B, A14B, tiny, tiny-dense, demo.
  try: MODEL_SIZE=A0.3B""",
        MODEL_SIZE="A03B",
    ),
    case(
        "size_like_no_other",
        """unknown MODEL_SIZE=xxx of qwen2.
  why: the sizes are 0.5B, 1.5B, 7B, 72B, A0.3B, A1B, A14B, tiny, tiny-dense, demo.
  try: MODEL_SIZE=A0.3B""",
        MODEL_SIZE="xxx",
    ),
    case(
        "other_family",
        """BASE_MODEL=llama3, but this script trains qwen2.
  why: every family has its own script, and the script decides.
  try: BASE_MODEL=qwen2""",
        BASE_MODEL="llama3",
    ),
    case(
        "unknown_family",
        """unknown family 'gpt'.
  why: families are qwen2, qwen3_next, deepseek_v2, mixtral, llama3, mamba2.
  try: --family qwen2""",
        family="gpt",
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
]


@pytest.mark.parametrize(("cuda", "variables", "text"), CASES)
def test_message(cuda: int, variables: dict[str, str], text: str):
    assert message(cuda, **variables) == text


def test_a_correct_run_has_no_message():
    assert message() == ""
    assert message(EXTRA_ARGS="--ffn-hidden-size 0", MODEL_SIZE="tiny-dense") == "", "no feed-forward blocks"
    assert message(EXTRA_ARGS="--num-query-groups 3 --kv-channels 3") == "", "no layer is softmax attention"
    assert (
        message(cuda=8, TP="2", PP="2", CP="1", EP="2", LAYER_TYPE_LIST="LLLN", GLOBAL_BATCH_SIZE="16") == ""
    )

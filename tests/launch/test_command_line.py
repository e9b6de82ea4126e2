"""Settings to Megatron's command line: parsed back by Megatron's own parser."""

import argparse
from pathlib import Path

import numpy as np
import pytest

from linear_moe.launch.megatron_args import shell_text, torchrun_command, training_arguments
from linear_moe.launch.resume import architecture
from linear_moe.model.families import (
    FAMILIES,
    POSITION_FLAGS,
    SIZE_FLAGS,
    SWITCHES,
    estimate_parameters,
    megatron_arguments,
    padded_vocab_size,
    size_fields,
)
from linear_moe.training.run import ARCHITECTURE, MEGATRON_NAMES
from tests.data.token_files import write_tokenizer, write_tokens
from tests.launch.plans import make_plan, message


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in (
        "--family",
        "--model-size",
        "--layer-kinds",
        "--la-module",
        "--layer-type-list",
        "--run-dir",
    ):
        parser.add_argument(flag)
    parser.add_argument("--sequential-experts", action="store_true")
    return add_megatron_arguments(parser)


def parse(parser: argparse.ArgumentParser, cuda: int = 0, **variables: str) -> argparse.Namespace:
    return parser.parse_args(training_arguments(make_plan(cuda, **variables)))


@pytest.mark.parametrize(("family", "size"), [(f, s) for f in FAMILIES for s in FAMILIES[f].sizes])
def test_megatron_reads_every_size_as_it_is(parser: argparse.ArgumentParser, family: str, size: str):
    args = parser.parse_args(megatron_arguments(FAMILIES[family], FAMILIES[family].sizes[size]))
    numbers = FAMILIES[family].sizes[size]
    for name, value in size_fields(numbers).items():
        assert getattr(args, {"norm_epsilon": "layernorm_epsilon"}.get(name, name)) == value, name
    assert args.swiglu and not args.add_bias_linear and args.normalization == "RMSNorm"
    assert args.add_qkv_bias == (family == "qwen2")
    assert args.untie_embeddings_and_output_weights != numbers.tie_embeddings
    assert args.multi_latent_attention == numbers.has_latent_attention != args.group_query_attention
    assert args.position_embedding_type == "rope"


@pytest.mark.parametrize(("family", "size"), [(f, s) for f in FAMILIES for s in FAMILIES[f].sizes])
def test_a_run_saves_what_a_resumed_one_is_compared_by(
    parser: argparse.ArgumentParser, family: str, size: str
):
    """config.json, written from Megatron's arguments, and the launcher's view of the same run, name by name."""
    plan = make_plan(family=family, MODEL_SIZE=size)
    args = parser.parse_args(training_arguments(plan))
    wanted = architecture(plan)
    assert wanted.keys() >= SWITCHES.keys() | {"rotary_percent", "family"}
    assert set(wanted) <= set(ARCHITECTURE)
    for name in wanted.keys() - {"layer_kinds"}:
        saved = getattr(args, MEGATRON_NAMES.get(name, name))
        if name == "moe_layer_freq" and saved == 1:
            saved = [1] * plan.size.num_layers
        assert saved == wanted[name] or (wanted["num_experts"] is None and name.startswith("moe_")), name


NOT_THE_FUNCTION = {
    "--fp32-residual-connection",  # rounding
    "--moe-aux-loss-coeff",
    "--moe-router-load-balancing-type",
    "--moe-router-dtype",
    "--moe-token-dispatcher-type",
    "--no-rope-fusion",
}
"""Flags of training and of speed: a run goes on with others."""

OF_EVERY_FAMILY = {"--normalization", "--swiglu", "--disable-bias-linear", "--position-embedding-type"}
FOLLOW_FROM_SIZES = {"--group-query-attention", "--rope-type", "--moe-layer-freq"}


def test_no_flag_of_a_family_escapes_the_comparison():
    compared = {*SIZE_FLAGS.values(), *SWITCHES.values(), *POSITION_FLAGS.values()}
    for family in FAMILIES.values():
        for size in family.sizes.values():
            flags = {word for word in megatron_arguments(family, size) if word.startswith("--")}
            assert flags <= compared | NOT_THE_FUNCTION | OF_EVERY_FAMILY | FOLLOW_FROM_SIZES


def test_the_router_of_qwen2(parser: argparse.ArgumentParser):
    args = parse(parser)
    assert args.moe_router_pre_softmax and args.moe_router_dtype == "fp32"
    assert args.moe_router_load_balancing_type == ["aux_loss"] and args.moe_aux_loss_coeff == [0.01]
    assert args.moe_token_dispatcher_type == "alltoall"
    assert parse(parser, MOE_AUX_LOSS_COEFF="0").moe_aux_loss_coeff == [0.0]


def test_fixed_hyper_parameters(parser: argparse.ArgumentParser):
    args = parse(parser, LR="3e-4", MIN_LR="3e-5", TRAIN_ITERS="50", WARMUP_ITERS="5")
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay, args.clip_grad) == (0.9, 0.95, 0.1, 1.0)
    assert (args.lr, args.min_lr, args.lr_decay_style) == (3e-4, 3e-5, "cosine")
    assert (args.train_iters, args.lr_decay_iters, args.lr_warmup_iters) == (50, 50, 5)
    assert (args.init_method_std, args.hidden_dropout, args.attention_dropout, args.split) == (
        0.008,
        0,
        0,
        "99,1,0",
    )


def test_starting_again_resumes_everything(parser: argparse.ArgumentParser):
    args = parse(parser, RUN_NAME="mine", OUTPUT_BASEPATH="/data/runs")
    assert args.load == args.save == "/data/runs/mine/checkpoint"
    assert args.run_dir == "/data/runs/mine" and args.tensorboard_dir == "/data/runs/mine/tensorboard"
    assert args.ckpt_format == "torch_dist" and args.override_opt_param_scheduler
    assert args.use_distributed_optimizer and args.dist_ckpt_optim_fully_reshardable
    assert not args.no_load_optim and not args.no_load_rng and not args.finetune
    assert args.pretrained_checkpoint is None


def test_the_layout(parser: argparse.ArgumentParser):
    args = parse(parser, cuda=8, TP="2", PP="2", VPP="2", CP="2", EP="2", DO="false")
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 2)
    assert (args.context_parallel_size, args.num_virtual_stages_per_pipeline_rank) == (2, 2)
    assert (args.expert_model_parallel_size, args.expert_tensor_parallel_size) == (2, 2)
    assert args.sequence_parallel, "experts under TP need it, SP or not"
    assert not args.use_distributed_optimizer and args.distributed_backend == "nccl"


def test_a_dense_model_may_leave_sequence_parallel_off(parser: argparse.ArgumentParser):
    args = parse(parser, MODEL_SIZE="tiny-dense", TP="2", GPUS_PER_NODE="2")
    assert not args.sequence_parallel and args.num_experts is None
    assert parse(parser, MODEL_SIZE="tiny-dense", TP="2", GPUS_PER_NODE="2", SP="true").sequence_parallel
    assert not parse(parser, SP="true").sequence_parallel, "nothing is cut, with experts or without"


def test_experts_are_not_cut_over_tp_on_cpu(parser: argparse.ArgumentParser):
    args = parse(parser, TP="2", EP="2", GPUS_PER_NODE="4")
    assert (args.expert_tensor_parallel_size, args.distributed_backend) == (1, "gloo")
    assert parse(parser, TP="2", GPUS_PER_NODE="2").expert_tensor_parallel_size == 2


@pytest.mark.parametrize(
    ("ac", "found"),
    [("none", (None, None, None)), ("sel", ("selective", None, None)), ("full", ("full", "uniform", 1))],
)
def test_recomputation(parser: argparse.ArgumentParser, ac: str, found: tuple):
    args = parse(parser, AC=ac)
    assert (args.recompute_granularity, args.recompute_method, args.recompute_num_layers) == found


@pytest.mark.parametrize(
    ("pr", "found"), [("fp32", (False, False)), ("bf16", (True, False)), ("fp16", (False, True))]
)
def test_precision(parser: argparse.ArgumentParser, pr: str, found: tuple):
    args = parse(parser, PR=pr)
    assert (args.bf16, args.fp16) == found


def test_switches(parser: argparse.ArgumentParser):
    args = parse(
        parser, PACK="true", USE_GEMM="false", TE="false", TOKEN_DROPPING="true", TRAIN_CAPACITY_FACTOR="2"
    )
    assert args.dataloader_inter_document_masking
    assert (
        args.sequential_experts and args.transformer_impl == "local" and args.moe_expert_capacity_factor == 2
    )
    assert not parse(parser).sequential_experts


def test_mock_data_needs_no_file(parser: argparse.ArgumentParser):
    args = parse(parser, VOCAB_SIZE="5000")
    assert args.mock_data and args.data_path is None
    assert (args.tokenizer_type, args.vocab_size, args.padded_vocab_size) == ("NullTokenizer", 5000, 5120)


@pytest.mark.parametrize(
    ("gpus", "layout", "found"),
    [(1, {}, 8), (2, {}, 8), (8, {}, 32), (3, {}, 12), (2, {"PP": "2", "VPP": "2"}, 8), (8, {"TP": "4"}, 8)],
)
def test_the_default_global_batch_suits_every_machine(gpus: int, layout: dict[str, str], found: int):
    plan = make_plan(gpus, **layout)
    assert plan.global_batch_size == found
    assert message(gpus, **layout) == ""
    assert plan.settings.tokens_per_step == found * plan.settings.seq_len


def test_blends(parser: argparse.ArgumentParser):
    args = parse(parser, DATASET_PATH="0.3 /a 0.7 /b", TOKENIZER="null")
    assert args.data_path == ["0.3", "/a", "0.7", "/b"]
    assert make_plan(DATASET_PATH="0.3 /a 0.7 /b", TOKENIZER="null").prefixes == ["/a", "/b"]
    assert make_plan(DATASET_PATH="/a /b", TOKENIZER="null").prefixes == ["/a", "/b"]


def test_a_blend_without_weights(parser: argparse.ArgumentParser, tmp_path: Path):
    """Each is drawn by its tokens: Megatron would end the run behind one epoch of them."""
    tokenizer = write_tokenizer(tmp_path / "tok")
    prefixes = [write_tokens(tmp_path / str(n), np.arange(n) % 300, tokenizer) for n in (3000, 1000)]
    args = parse(parser, DATASET_PATH=" ".join(prefixes), TOKENIZER="null")
    assert args.data_path == ["3000", prefixes[0], "1000", prefixes[1]]
    assert parse(parser, DATASET_PATH=prefixes[0], TOKENIZER="null").data_path == prefixes[:1]


NOT_OF_A_VARIABLE = {
    *("--data-cache-path", "--tensorboard-dir", "--lr-decay-iters", "--dist-ckpt-optim-fully-reshardable"),
}
"""Flags that follow a variable only until EXTRA_ARGS says otherwise."""


@pytest.mark.parametrize(
    "changed",
    [
        *({name: "2"} for name in ("TP", "PP", "CP", "EP", "ETP", "BATCH_SIZE", "LR", "MIN_LR", "WARMUP_ITERS")),
        *({name: "64"} for name in ("SEQ_LEN", "GLOBAL_BATCH_SIZE", "SEED", "TRAIN_ITERS", "VOCAB_SIZE")),
        *({name: "7"} for name in ("SAVE_INTERVAL", "EVAL_ITERS", "EVAL_INTERVAL", "LOG_INTERVAL")),
        *({name: "true"} for name in ("PACK", "TE", "TOKEN_DROPPING")),
        *({name: "false"} for name in ("DO", "USE_GEMM")),
        *({"PR": value} for value in ("fp16", "fp32")),
        *({"AC": value} for value in ("full", "none")),
        {"PP": "2", "VPP": "2"},
        {"LA_MODULE": "gla", "LAYER_TYPE_LIST": "LN"},
        {"MIXER_MODULES": "tests.launch.plans"},
        {"MOE_AUX_LOSS_COEFF": "0"},
        {"OUTPUT_BASEPATH": "/elsewhere"},
        {"DATASET_PATH": "/a", "TOKENIZER": "null"},
        {"PRETRAIN_CHECKPOINT_PATH": "/a"},
    ],
    ids=str,
)  # fmt: skip
def test_extra_args_cannot_contradict_a_variable(changed: dict[str, str]):
    """What a variable changes of the command line is refused in EXTRA_ARGS."""

    def flags(**variables: str) -> set[tuple[str, ...]]:
        words = " ".join(training_arguments(make_plan(8, **variables))).split(" --")
        return {tuple(word.removeprefix("--").split(" ", 1)) for word in words}

    found = {f"--{flag}" for flag, *_ in flags() ^ flags(**changed)} - NOT_OF_A_VARIABLE
    assert found
    for flag in found:
        assert message(8, EXTRA_ARGS=f"{flag} 1").startswith(f"EXTRA_ARGS holds {flag}, which "), flag


def test_extra_args_come_last_and_sizes_in_them_are_seen(parser: argparse.ArgumentParser):
    plan = make_plan(
        EXTRA_ARGS="--num-layers 8 --log-params-norm --hidden-size=256 --weight-decay 0",
        LAYER_TYPE_LIST="LLLN",
    )
    assert (plan.size.num_layers, plan.size.hidden_size, len(plan.kinds)) == (8, 256, 8)
    arguments = training_arguments(plan)
    assert arguments[-3:] == ["--log-params-norm", "--weight-decay", "0"]
    assert arguments.count("--num-layers") == 1 and parser.parse_args(arguments).num_layers == 8


@pytest.mark.parametrize(("text", "dense"), [("([0]*2+[1]*2)", 2), ("[0]+[1]*3", 1), ("1", 0)])
def test_layers_without_experts_are_of_the_size(text: str, dense: int):
    plan = make_plan(EXTRA_ARGS=f"--moe-layer-freq {text}")
    assert plan.size.first_dense_layers == dense and plan.extra_args == ()
    assert training_arguments(plan).count("--moe-layer-freq") == (dense > 0)


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_the_padded_vocabulary_does_not_depend_on_tp(tp: int):
    assert padded_vocab_size(151643 + 293, tp) == 151936


def test_the_padded_vocabulary_divides():
    assert padded_vocab_size(1000, 3) % 3 == 0


def test_parameter_estimates_are_those_of_the_published_table():
    qwen2 = FAMILIES["qwen2"]
    for name, total, active in (("A0.3B", 2.48e9, 0.63e9), ("A1B", 7.34e9, 1.70e9)):
        size = qwen2.sizes[name]
        found = estimate_parameters(size, ("softmax",) * size.num_layers, 151936)
        assert found == (pytest.approx(total, rel=0.01), pytest.approx(active, rel=0.01))


def test_torchrun_on_one_node_takes_a_free_port():
    command = torchrun_command(make_plan(GPUS_PER_NODE="4", TP="2"))
    assert command[1:3] == ["-m", "torch.distributed.run"]
    assert "--nproc-per-node=4" in command and "--rdzv-endpoint=127.0.0.1:0" in command


def test_torchrun_on_many_nodes():
    command = torchrun_command(
        make_plan(8, NNODES="2", NODE_RANK="1", MASTER_ADDR="gpu07", GLOBAL_BATCH_SIZE="64")
    )
    assert {"--nnodes=2", "--node-rank=1", "--master-addr=gpu07", "--master-port=29500"} < set(command)


def test_the_printed_command_can_be_typed():
    import shlex

    command = torchrun_command(make_plan(OUTPUT_BASEPATH="/tmp/it's here", EXTRA_ARGS="--x 'a b'"))
    assert shlex.split(shell_text(command).replace("\\\n", "")) == command


def test_pretrained_weights(tmp_path: Path, parser: argparse.ArgumentParser):
    checkpoint = tmp_path / "run" / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "latest_checkpointed_iteration.txt").write_text("20")
    for given in (tmp_path / "run", checkpoint):
        assert parse(parser, PRETRAIN_CHECKPOINT_PATH=str(given)).pretrained_checkpoint == str(checkpoint)

"""A run's arguments, turned into those of one process that only reads: the same model, nothing of its training.

What the run was told is kept by default, so that no flag that shapes the model can be forgotten; what is reset is
listed here. Megatron's parser keeps training, layout and input/output in argument groups of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
from typing import Any, NoReturn

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.training.arguments import add_megatron_arguments, validate_args

from linear_moe import lsm
from linear_moe.lsm.mom import Memories
from linear_moe.training import arguments, engine

RESET_GROUPS = (
    "Logits Distillation",
    "Transformer-Engine",
    "autoresume",
    "checkpointing",
    "data and dataloader",
    "distributed init",
    "fault injector",
    "ft_package",
    "In-process restart",
    "inference",
    "learning rate and weight decay",
    "logging",
    "mixed precision",
    "msc",
    "one logger",
    "profiling",
    "regularization",
    "rerun engine",
    "rl",
    "straggler",
    "training",
    "validation",
    "workload inspector",
)
"""Megatron's argument groups of which nothing shapes the model, but for ``KEPT``."""

KEPT = ("rope_type", "seq_length", "fp16", "bf16")
"""Arguments that do, in a group or config that is reset."""

RESET = (
    # ours
    "run_dir",
    "lsm_recompute",
    "recompute_expert_inputs",
    "expert_gradients_in_place",
    # training only
    "config_logger_dir",
    "distribute_saved_activations",
    "fine_grained_activation_offloading",
    "fp4",
    "fp8",
    "init_model_with_meta_device",
    "qk_clip",
    "recompute_granularity",
    "recompute_method",
    "recompute_modules",
    "recompute_num_layers",
    # one process, step by step
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "cuda_graph_impl",
    "enable_cuda_graph",
    "external_cuda_graph",
    "flash_decode",
    # how tokens reach experts, and fusions of it
    "moe_enable_deepep",
    "moe_enable_routing_replay",
    "moe_flex_dispatcher_backend",
    "moe_paged_stash",
    "moe_permute_fusion",
    "moe_router_fusion",
    "moe_router_padding_for_fp8",
    "moe_router_padding_for_quantization",
    "moe_shared_expert_overlap",
    "moe_token_dispatcher_type",
    # A token's experts may depend on nothing but the token: a capacity depends on the other tokens of the call, so
    # that one token at a time would give other text than all at once; noise serves training.
    "moe_expert_capacity_factor",
    "moe_expert_rank_capacity_factor",
    "moe_input_jitter_eps",
    "moe_pad_expert_input_to_capacity",
    "moe_router_force_biased",
    "moe_router_force_load_balancing",
)
"""Arguments reset one by one; those of ``ModelParallelConfig`` and of the backend follow by themselves."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(
            f"config.json holds arguments that this version does not know: {message}\n"
            f"  why: the model is rebuilt from the command line of its training\n"
            f"  try: the version of linear_moe in its 'versions', or the one that trained the run"
        )


def single_process_arguments(
    argv: list[str], *, padded_vocab_size: int, dtype: torch.dtype | None = None, tensor_parallel: int = 1
) -> argparse.Namespace:
    """Validated arguments of one process that holds the whole model of a run, for ``arguments.model_config``.

    With ``tensor_parallel`` of several processes, which share it by tensor parallelism alone.

    Args:
        argv: command line of the training.
        padded_vocab_size: rows of the embedding; by itself it would follow the tensor-parallel size.
        dtype: of the weights; ``None``: the run's.
        tensor_parallel: processes.

    Raises:
        ValueError: ``argv`` has arguments that do not exist here, a module of mixers that cannot be imported, or the
            model cannot be divided so.
    """
    arguments.import_mixer_modules(argv)
    parser = _Parser(allow_abbrev=False)
    arguments.add_arguments(add_megatron_arguments(parser))
    args, defaults = parser.parse_args(argv), vars(parser.parse_args([]))
    for name in _reset_names(parser):
        setattr(args, name, defaults[name])
    half = dtype or (torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32)
    args.bf16, args.fp16 = half is torch.bfloat16, half is torch.float16
    args.padded_vocab_size = padded_vocab_size
    args.moe_token_dispatcher_type = "alltoall"
    args.perform_initialization = False  # every weight is loaded
    args.micro_batch_size = 1  # demanded
    # torch.compile of one sum or product, anew for shape after shape: seconds each
    args.bias_dropout_fusion = args.bias_swiglu_fusion = args.bias_gelu_fusion = False
    args.rank, args.world_size, args.tensor_model_parallel_size = 0, tensor_parallel, tensor_parallel
    _check_divisible(args, tensor_parallel)
    arguments.resolve(args)
    for name, options in args.mixer_options.items():
        if issubclass(lsm.get(name).Config, Memories):
            options.pop("capacity", None)  # as that of experts: it depends on the other tokens of the call
    with contextlib.redirect_stdout(io.StringIO()):  # all 800 arguments
        validate_args(args, {})
    if dtype is not None:
        args.params_dtype = dtype  # Megatron knows no flag for float64
    return args


def _check_divisible(args: argparse.Namespace, ranks: int) -> None:
    """What Megatron would assert; heads of mixers are checked with their options."""
    sizes = {
        "attention heads": args.num_attention_heads,
        "rows of the embedding": args.padded_vocab_size,
        "channels of the feed-forward block": args.ffn_hidden_size,
        "channels of an expert": args.moe_ffn_hidden_size if args.num_experts else None,
    }
    for name, size in sizes.items():
        if size is not None and size % ranks:
            raise ValueError(
                f"{ranks} processes cannot share {size} {name}\n"
                f"  why: tensor parallelism gives every process as many\n"
                f"  try: torchrun --nproc-per-node N with an N that divides {size}, or python alone"
            )


def shaping_arguments(argv: list[str]) -> list[str]:
    """The part of a training's command line that shapes its model: no paths, no data, no optimizer."""
    arguments.import_mixer_modules(argv)
    parser = _Parser(allow_abbrev=False)
    arguments.add_arguments(add_megatron_arguments(parser))
    dropped = _reset_names(parser) | {
        "tokenizer_type",
        "tokenizer_model",
        "vocab_size",
        "mock_data",
        "data_path",
    }
    kept: list[str] = []
    is_kept = False
    for word in argv:
        action = parser._option_string_actions.get(word.partition("=")[0])
        if action is not None:
            is_kept = action.dest not in dropped
        if is_kept:
            kept.append(word)
    return kept


def _reset_names(parser: argparse.ArgumentParser) -> set[str]:
    groups: dict[str | None, Any] = {group.title: group for group in parser._action_groups}
    names = {action.dest for title in RESET_GROUPS for action in groups[title]._group_actions}
    known = {action.dest for action in parser._actions}
    names |= {field.name for field in dataclasses.fields(ModelParallelConfig)} & known
    names |= {*RESET, *engine.defaults_without_te(), "transformer_impl", "attention_backend"}
    return names - set(KEPT)

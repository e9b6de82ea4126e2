"""Pretrain a Linear-MoE model with Megatron's own ``pretrain()``.

``python -m linear_moe.training.pretrain <arguments>`` is what ``examples/*/run_pretrain_*.sh`` starts on every rank. It
takes Megatron's arguments and ours (:mod:`linear_moe.training.arguments`), on CUDA and, through the CPU platform,
without it.
"""

from __future__ import annotations

from linear_moe.training import cpu

if cpu.needed():
    cpu.activate()  # before Megatron looks for a device

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.enums import ModelType
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from megatron.training import get_args, get_timers, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import set_global_variables
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from linear_moe.lsm.mom import Memories
from linear_moe.model.builder import padded_vocab_size
from linear_moe.model.config import LinearMoEConfig, mixer_config
from linear_moe.model.memory_balance import set_loss_scale
from linear_moe.model.output_loss import loss_in_chunks
from linear_moe.model.pattern import SOFTMAX
from linear_moe.training import arguments, engine, finetune
from linear_moe.training.agreement import check_same_arguments
from linear_moe.training.damage import cannot_be_loaded
from linear_moe.training.data import get_batch, train_valid_test_datasets
from linear_moe.training.flops import FlopsPerToken, flops_per_token
from linear_moe.training.memory_load import MemoryLoad
from linear_moe.training.metrics import ExpertLoad, RunLog
from linear_moe.training.run import write_config


def main(argv: list[str], log: type[RunLog] = RunLog) -> None:
    """Parse ``argv``, build the configs, and hand over to Megatron; joins the process group or makes one.

    ``log`` is what is told of every step; linear_moe.bench watches steps with one of its own.
    """
    owns_group = not dist.is_initialized()
    args = prepare_arguments(argv)
    config = arguments.model_config(args)
    flops = flops_per_token(config.transformer, padded_vocab_size(config))
    loads = _loads(config.transformer)
    # Where the model has been made on every rank, and nothing has been exchanged.
    config.pre_wrap_hooks += [partial(_agree, argv), partial(_watch, loads)]
    run_dir = Path(args.run_dir) if args.run_dir else None
    run_log = log(run_dir, flops, loads)
    engine.install(
        flops=partial(step_flops, flops), training_log=run_log.wrap, evaluation=run_log.evaluation()
    )
    loaded = []

    def when_loaded() -> None:
        loaded.append(True)
        if run_dir is not None and args.rank == 0:
            write_config(run_dir, args, argv)

    try:
        pretrain(
            pretrain_cfg_container_from_args(args, config),
            _datasets(when_loaded),
            ModelType.encoder_or_decoder,
            forward_step,
        )
    except CheckpointException as error:
        if loaded:
            raise
        raise cannot_be_loaded(args, error) from error
    if owns_group:
        dist.barrier()
        dist.destroy_process_group()


def _datasets(when_loaded: Callable[[], None]) -> Callable[..., Any]:
    """Megatron's dataset provider, called once the model is built and its checkpoint loaded: then ``when_loaded``.

    An attempt that fails before that, with arguments that do not fit the run, leaves the run's config.json as it was.
    """

    def provide(num_samples: list[int], vp_stage: int | None = None) -> Any:
        when_loaded()
        return train_valid_test_datasets(num_samples, vp_stage)

    provide.is_distributed = train_valid_test_datasets.is_distributed  # type: ignore[attr-defined]
    return provide


def prepare_arguments(argv: list[str]) -> Any:
    """Parse and validate the command line, and set Megatron's global state."""
    arguments.import_mixer_modules(argv)
    command_line, sys.argv = sys.argv, [sys.argv[0], *argv]  # Megatron's parser reads no other
    try:
        args = parse_args(arguments.add_arguments)
    finally:
        sys.argv = command_line
    arguments.resolve(args)
    finetune.resolve(args)
    if args.context_parallel_size > 1 or args.dataloader_inter_document_masking:
        # Otherwise each rank divides its loss by its own count of tokens, which is wrong where counts differ.
        args.calculate_per_token_loss = True
    # Megatron's line is replaced by ours: its interval never ends (linear_moe.training.metrics).
    args.progress_interval, args.log_interval = args.log_interval, sys.maxsize
    validate_args(args, {})
    set_global_variables(args)
    return args


def _loads(config: LinearMoEConfig) -> list[ExpertLoad | MemoryLoad]:
    """What the model routes: tokens to experts, tokens to memories."""
    loads: list[ExpertLoad | MemoryLoad] = []
    if config.num_moe_experts is not None:
        loads.append(ExpertLoad(config.num_layers, config.num_moe_experts))
    mixtures = {}
    for layer, kind in enumerate(config.layer_kinds):
        options: object = None if kind == SOFTMAX else mixer_config(kind, config)
        if isinstance(options, Memories):
            mixtures[layer] = options.num_memories
    return [*loads, MemoryLoad(config.num_layers, mixtures)] if mixtures else loads


def _agree(argv: list[str], model: list[nn.Module]) -> list[nn.Module]:
    check_same_arguments(argv)
    return model


def _watch(loads: list[ExpertLoad | MemoryLoad], model: list[nn.Module]) -> list[nn.Module]:
    for load in loads:
        for chunk in model:
            load.watch(chunk)
    return model


def step_flops(
    flops: FlopsPerToken,
    args: Any,
    batch_size: int,
    seqlen_squared_sum_in_batch: float | None = None,
    total_real_tokens_in_batch: float | None = None,
) -> float:
    """Operations of one step, in the signature of Megatron's ``num_floating_point_operations``."""
    tokens = total_real_tokens_in_batch
    tokens = batch_size * args.seq_length if tokens is None else tokens
    return flops.of_step(tokens, args.seq_length, seqlen_squared_sum_in_batch)


def forward_step(data_iterator: Iterator, model: nn.Module) -> tuple[Tensor, Any]:
    """One micro-batch through this stage: Megatron's forward-step function."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    batch = get_batch(data_iterator, vp_stage)
    timers("batch-generator").stop()
    config = get_model_config(model)
    finetune.weigh_balance_losses(config, get_args().loss_share)
    set_loss_scale(config)
    output = model(
        batch.tokens,
        batch.position_ids,
        None,
        labels=batch.labels,
        loss_mask=batch.loss_mask,
        packed_seq_params=batch.packed_seq_params,
        padding_mask=finetune.local_padding(batch.padding_mask, model),
        output_processor=loss_in_chunks(chunk) if (chunk := get_args().output_chunk_size) else None,
    )
    return output, partial(loss_func, batch.loss_mask)


def loss_func(loss_mask: Tensor | None, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the losses of unmasked tokens, their number, and both for the log; called on the last stage only."""
    assert loss_mask is not None
    mask = loss_mask.reshape(-1).float()
    loss = (losses.reshape(-1).float() * mask).sum()
    num_tokens = mask.sum().to(torch.int)
    report = torch.stack([loss.detach(), num_tokens.to(loss.dtype)])
    return loss, num_tokens, {"lm loss": report}


if __name__ == "__main__":
    main(sys.argv[1:])

"""Supervised finetuning: packs of whole samples as Megatron's datasets, in an order that a restart keeps.

A sequence holds samples side by side that never see each other (``cu_seqlens``, as packed documents in pretraining),
and padding only behind the last one. Tokens in the loss are those of answers; gradients are divided by their number in
the whole step, wherever they lie.

Letters: S tokens of a sequence, n tokens of a sample.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor, nn
from torch.utils.data import Dataset

from linear_moe.data.instructions.packing import Schedule, alone, pack
from linear_moe.data.instructions.prepare import Prepared, open_prepared
from linear_moe.data.instructions.tokens import Sample


def add_arguments(group: argparse._ActionsContainer) -> None:
    """Flags of finetuning."""
    group.add_argument("--instruction-data", metavar="FOLDER", help="finetune on samples prepared there")
    group.add_argument("--valid-instruction-data", metavar="FOLDER", help="samples to validate on")
    group.add_argument(
        "--no-instruction-packing", action="store_true", help="one sample a sequence, the rest is padding"
    )


def resolve(args: argparse.Namespace) -> None:
    """What finetuning asks of Megatron; before its own validation.

    Raises:
        ValueError: a folder holds no prepared samples, or longer ones than a sequence.
    """
    args.loss_share = 1.0
    if args.instruction_data is None:
        return
    args.dataloader_inter_document_masking = True
    for folder in filter(None, (args.instruction_data, args.valid_instruction_data)):
        longest = int(open_prepared(Path(folder)).lengths.max())
        if longest > args.seq_length:
            raise ValueError(
                f"{folder} has a sample of {longest} tokens, and a sequence has {args.seq_length}\n"
                f"  why: a sample is never cut in training\n"
                f"  try: prepare it for this length, or --seq-length {longest}"
            )
    report = open_prepared(Path(args.instruction_data)).report
    args.loss_share = report.learned_tokens / report.tokens


class InstructionDataset(Dataset):
    """Sequences in the order of training, as Megatron's loader takes them.

    Each is a dict of ``tokens``, ``labels``, ``position_ids`` int64 ``[S]``, ``loss_mask`` float32 ``[S]``,
    ``cu_seqlens`` int32 ``[S + 1]`` (padded with S) and ``num_tokens`` int64 ``[]``: where padding begins.
    """

    def __init__(
        self, samples: Prepared, packs: list[list[int]], schedule: Schedule, seq_length: int, slots: int
    ) -> None:
        self.samples, self.packs, self.schedule = samples, packs, schedule
        self.seq_length, self.slots = seq_length, slots
        self._epoch, self._order = -1, np.empty(0)

    def __len__(self) -> int:
        return self.slots

    def __getitem__(self, slot: int) -> dict[str, np.ndarray]:
        epoch, place = self.schedule.place(slot)
        if place is None:
            return sequence([], self.seq_length)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.schedule.order(epoch)
        return sequence(
            [self.samples.sample(i) for i in self.packs[int(self._order[place])]], self.seq_length
        )


def sequence(samples: list[Sample], length: int) -> dict[str, np.ndarray]:
    """Samples side by side in a sequence of ``length``; none: padding alone."""
    tokens, labels, positions = (np.zeros(length, dtype=np.int64) for _ in range(3))
    mask = np.zeros(length, dtype=np.float32)
    starts, start = [0], 0
    for sample in samples:
        end = start + sample.positions
        tokens[start:end] = sample.tokens[:-1]
        labels[start:end] = sample.tokens[1:]
        mask[start:end] = sample.learned[1:]
        positions[start:end] = np.arange(end - start)
        starts.append(end)
        start = end
    boundaries = np.full(length + 1, length, dtype=np.int32)
    boundaries[: len(starts)] = starts
    # Experts see at least one token that counts: their balance is a mean over these.
    counted = np.asarray(max(start, 1), dtype=np.int64)
    return {
        "tokens": tokens,
        "labels": labels,
        "loss_mask": mask,
        "position_ids": positions,
        "cu_seqlens": boundaries,
        "num_tokens": counted,
    }


def instruction_datasets(args: argparse.Namespace) -> tuple[Dataset, Dataset | None, None]:
    """Train and validation set; every evaluation reads the whole validation set."""
    step = args.global_batch_size
    # Megatron's sampler wants some left, also of a run that has ended or that is told to end earlier.
    slots = max(args.train_iters * step, args.consumed_train_samples) + step
    train = _dataset(args, args.instruction_data, slots, shuffle=True)
    if args.valid_instruction_data is None or not args.eval_iters:
        return train, None, None
    evaluations = args.train_iters // args.eval_interval + 2
    slots = args.consumed_valid_samples + evaluations * args.eval_iters * step
    valid = _dataset(args, args.valid_instruction_data, slots, shuffle=False)
    return train, valid, None


def _dataset(args: argparse.Namespace, folder: str, slots: int, *, shuffle: bool) -> InstructionDataset:
    samples = open_prepared(Path(folder))
    packs = packs_of(samples, args.seq_length, args.seed, packed=not args.no_instruction_packing)
    schedule = Schedule(len(packs), args.global_batch_size, args.seed, shuffle)
    return InstructionDataset(samples, packs, schedule, args.seq_length, slots)


def packs_of(samples: Prepared, seq_length: int, seed: int, *, packed: bool) -> list[list[int]]:
    """Samples of each sequence."""
    return pack(samples.lengths, seq_length, seed) if packed else alone(samples.lengths)


def padding_mask(num_tokens_B: Tensor, length: int) -> Tensor:
    """``[B, S]`` bool, true where a sequence is padding."""
    return torch.arange(length, device=num_tokens_B.device) >= num_tokens_B[:, None]


def local_padding(mask_BT: Tensor | None, model: nn.Module) -> Tensor | None:
    """The padding of a micro-batch as this stage of the model takes it; ``None`` where no router asks.

    Megatron cuts it for sequence parallelism in the first stage only.
    """
    config = get_model_config(model)
    if mask_BT is None or config.num_moe_experts is None:
        return None
    if config.sequence_parallel and not get_attr_wrapped_model(model, "pre_process"):
        size, rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
        return mask_BT.chunk(size, dim=1)[rank]
    return mask_BT


def weigh_balance_losses(config: TransformerConfig, loss_share: float) -> None:
    """Let auxiliary losses of experts and memories weigh as in pretraining.

    They are multiplied by the tokens of a micro-batch, since gradients are divided by the tokens in the loss; of an
    instruction those are fewer, by ``loss_share``.
    """
    if loss_share != 1 and config.moe_grad_scale_func is None:
        config.moe_grad_scale_func = partial(_scale, config, loss_share)


def _scale(config: TransformerConfig, loss_share: float) -> Tensor:
    scale = torch.full((1,), loss_share, device=torch.cuda.current_device())
    scale_loss: Callable[[Any], Any] | None = config.grad_scale_func
    return scale if scale_loss is None else scale_loss(scale)

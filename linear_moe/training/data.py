"""Training data: Megatron's datasets, and the micro-batch that each rank sees of them.

Every tensor-parallel rank reads its own copy, as every context-parallel rank does: the datasets are indexed and
shuffled by a seed, so all get the same. Megatron would read on one of them and broadcast shapes before tensors, for
which the host waits in every micro-batch until the device is idle.

With ``--dataloader-inter-document-masking`` a sequence holds several documents that never see each other. Their
boundaries travel as ``[B, N + 1]`` in ``PackedSeqParams`` of format ``sbhd``: the batch keeps its shape, rotary
positions run on (they are relative, so the document mask makes that exact), and mixers and attention read them.

Letters: B micro-batch, S tokens of a sequence, N documents of a sequence.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_batch_on_this_cp_rank
from megatron.training import get_args, get_tokenizer
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor

from linear_moe.model.sequence import mark_padding
from linear_moe.training.finetune import instruction_datasets, padding_mask


@dataclass(frozen=True)
class Batch:
    """This rank's share of a micro-batch; ``None`` where this pipeline stage needs nothing."""

    tokens: Tensor | None = None
    labels: Tensor | None = None
    loss_mask: Tensor | None = None
    position_ids: Tensor | None = None
    packed_seq_params: PackedSeqParams | None = None
    padding_mask: Tensor | None = None


def dataset_config(args: argparse.Namespace) -> GPTDatasetConfig:
    """Megatron's dataset config from its arguments."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        inter_document_masking=args.dataloader_inter_document_masking,
    )


def train_valid_test_datasets(num_samples: list[int], vp_stage: int | None = None) -> Any:
    """Megatron's dataset provider: train, validation and test sets of ``num_samples`` sequences each; 0 is no set."""
    args = get_args()
    if args.instruction_data is not None:
        return instruction_datasets(args) if needs_data(args, vp_stage) else (None, None, None)
    config = dataset_config(args)
    dataset = MockGPTDataset if config.mock else GPTDataset
    found = BlendedMegatronDatasetBuilder(
        dataset, enough_samples(args, num_samples), lambda: needs_data(args, vp_stage), config
    ).build()
    # The sampler refuses an empty set, and of a blend nothing asked is nothing given.
    return tuple(None if asked == 0 else part for part, asked in zip(found, num_samples, strict=True))


train_valid_test_datasets.is_distributed = True  # type: ignore[attr-defined]


def enough_samples(args: argparse.Namespace, num_samples: list[int]) -> list[int]:
    """``num_samples``, or more: Megatron counts from step 0 what a run reads on from its checkpoint.

    It falls short for one that has ended, or whose batch or evaluations have changed, and a blend has no sequence more.
    """
    train, valid, test = num_samples
    steps = max(
        args.train_iters - args.iteration, 1
    )  # its sampler wants some left, also behind the last step
    train = max(train, args.consumed_train_samples + steps * args.global_batch_size)
    if valid:
        before, after = args.iteration // args.eval_interval, args.train_iters // args.eval_interval
        evaluations = max(after - before, 0) + 1
        valid = max(valid, args.consumed_valid_samples + evaluations * test)
    return [train, valid, test]


def needs_data(args: argparse.Namespace, vp_stage: int | None = None) -> bool:
    """Whether this stage reads data: the first and the last see tokens, and all see boundaries of packed documents."""
    first = mpu.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    last = mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    return first or last or args.dataloader_inter_document_masking


def get_batch(data_iterator: Iterator | None, vp_stage: int | None = None) -> Batch:
    """The next micro-batch, cut for this context-parallel rank."""
    args = get_args()
    if not needs_data(args, vp_stage):
        return Batch()
    assert data_iterator is not None
    packed, instructions = args.dataloader_inter_document_masking, args.instruction_data is not None
    sample, device = next(data_iterator), torch.cuda.current_device()
    names = ["tokens", "labels", "loss_mask", "position_ids"] + (["num_tokens"] if instructions else [])
    # The loader pins what it gives: nobody waits for these copies.
    received = {name: sample[name].to(device, non_blocking=True) for name in names}
    cu_seqlens = trim_boundaries(sample["cu_seqlens"], device) if packed else None
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff(dim=1).flatten()
        update_seqlen_stats_from_cu_seqlens(torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))
    if instructions:
        received["padding_mask"] = padding_mask(received.pop("num_tokens"), args.seq_length)
    local = get_batch_on_this_cp_rank(
        received,
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
        use_per_sequence_balancing=True,
    )
    packed_seq_params = documents(cu_seqlens, args.seq_length)
    if packed_seq_params is not None and instructions:
        mark_padding(packed_seq_params, local["padding_mask"])
    return Batch(**local, packed_seq_params=packed_seq_params)


def trim_boundaries(cu_seqlens: Tensor, device: torch.device | int | None = None) -> Tensor:
    """Drop the padding that no sequence of the batch needs: ``[B, S + 1]`` of the host to ``[B, max N + 1]``."""
    most = int((cu_seqlens.diff(dim=1) > 0).sum(dim=1).max())
    return cu_seqlens.to(device, non_blocking=True)[:, : most + 1].contiguous()


def documents(cu_seqlens: Tensor | None, seq_length: int) -> PackedSeqParams | None:
    """Document boundaries ``[B, N + 1]`` in the form that every layer reads; ``None`` stays ``None``."""
    if cu_seqlens is None:
        return None
    return PackedSeqParams(
        qkv_format="sbhd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=seq_length,
        max_seqlen_kv=seq_length,
    )

"""The layout of the sequences in a micro-batch, from what Megatron hands to every layer.

Megatron passes ``packed_seq_params`` (or ``None``) and local tokens; mixers and softmax attention need a
:class:`~linear_moe.parallel.layout.SequenceLayout`. It is built once per micro-batch and kept on ``packed_seq_params``.

Letters: B batch, T local tokens, S tokens of a whole sequence, N documents of a sequence.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from linear_moe.parallel.layout import SequenceLayout

_MEMO = "_linear_moe_layouts"
_PADDING = "_linear_moe_padding"


def mark_padding(packed_seq_params: PackedSeqParams, padding_BT: Tensor) -> None:
    """Say which local tokens are padding, ``[B, T]`` bool, in sequences that are passed to every layer."""
    packed_seq_params.__dict__[_PADDING] = padding_BT


def padding_of(packed_seq_params: PackedSeqParams | None) -> Tensor | None:
    """What :func:`mark_padding` said; ``None``: nothing is padding."""
    return None if packed_seq_params is None else packed_seq_params.__dict__.get(_PADDING)


def layout_of(
    packed_seq_params: PackedSeqParams | None,
    *,
    batch: int,
    local_length: int,
    cp_group: dist.ProcessGroup | None,
) -> SequenceLayout:
    """The layout of ``batch`` sequences of which this rank holds ``local_length`` tokens each.

    Args:
        packed_seq_params: document boundaries, or ``None`` for one document per sequence. ``sbhd`` with
            ``cu_seqlens_q`` ``[B, N + 1]`` int over the whole sequences (start at 0, end at S, padded by
            repeating S), or ``thd`` with ``[N + 1]`` when ``batch`` is 1 and there is no context parallelism.
        batch: B.
        local_length: T, after the gather of sequence parallelism; S is ``T * cp_size``.
        cp_group: the context-parallel group; ``None`` without one.

    Raises:
        ValueError: the packing is of a kind we do not support.
    """
    cp_size = 1 if cp_group is None else cp_group.size()
    cp_rank = 0 if cp_group is None else cp_group.rank()
    length = local_length * cp_size
    if packed_seq_params is None:
        return SequenceLayout(batch, length, cp_size, cp_rank)
    memo = packed_seq_params.__dict__.setdefault(_MEMO, {})
    key = (batch, length, cp_size, cp_rank)
    if key not in memo:
        cu_seqlens = _boundaries(packed_seq_params, batch, length, cp_size)
        memo[key] = SequenceLayout(batch, length, cp_size, cp_rank, cu_seqlens)
    return memo[key]


def _boundaries(packed: PackedSeqParams, batch: int, length: int, cp_size: int) -> Tensor:
    if packed.local_cp_size is not None or packed.cp_group is not None:
        raise ValueError(
            "context-parallel groups that change from micro-batch to micro-batch are not supported\n"
            "  why: the memory of a document is passed along one fixed group of ranks\n"
            "  try: run without --hybrid-context-parallel"
        )
    if packed.qkv_format == "sbhd":
        return _checked(packed.cu_seqlens_q, batch, length)
    if packed.qkv_format != "thd":
        raise ValueError(
            f"packed sequences in {packed.qkv_format!r} format are not supported\n"
            f"  why: document boundaries are read as [B, N + 1] ('sbhd') or, for one sequence, as [N + 1] ('thd')\n"
            f"  try: PackedSeqParams(qkv_format='sbhd', cu_seqlens_q=..., cu_seqlens_kv=...)"
        )
    if cp_size > 1 or batch != 1:
        raise ValueError(
            f"packed sequences in 'thd' format need one sequence on one rank, got batch {batch} and context "
            f"parallel size {cp_size}\n"
            f"  why: Megatron cuts every document of them into its own zigzag, which linear mixers cannot follow\n"
            f"  try: qkv_format='sbhd' with cu_seqlens [B, N + 1], tokens cut per sequence"
        )
    cu_seqlens = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    # Tokens after the last boundary are padding, if there are any: a document of their own.
    whole = torch.nn.functional.pad(cu_seqlens[None], (0, 1), value=length)
    return _checked(whole, batch, length)


def _checked(cu_seqlens: Tensor | None, batch: int, length: int) -> Tensor:
    problem = None
    if cu_seqlens is None or cu_seqlens.ndim != 2 or cu_seqlens.shape[0] != batch or cu_seqlens.shape[1] < 2:
        shape = None if cu_seqlens is None else list(cu_seqlens.shape)
        problem = f"cu_seqlens has shape {shape} for {batch} sequences"
    elif cu_seqlens.is_floating_point():
        problem = f"cu_seqlens has dtype {cu_seqlens.dtype}"
    # Values are checked on the CPU only: a GPU would be waited for.
    elif cu_seqlens.device.type == "cpu" and not _is_partition(cu_seqlens, length):
        problem = f"cu_seqlens {cu_seqlens.tolist()} does not divide sequences of {length} tokens"
    if problem is not None:
        raise ValueError(
            f"{problem}\n"
            f"  why: each of its rows holds the document boundaries of one whole sequence\n"
            f"  try: an integer tensor [{batch}, N + 1] that starts at 0, never falls, and ends at {length} "
            f"(repeat {length} as padding)"
        )
    assert cu_seqlens is not None
    return cu_seqlens


def _is_partition(cu_seqlens: Tensor, length: int) -> bool:
    starts, ends = cu_seqlens[:, 0] == 0, cu_seqlens[:, -1] == length
    return bool(starts.all() and ends.all() and (cu_seqlens.diff(dim=1) >= 0).all())

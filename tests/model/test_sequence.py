"""What Megatron says about packing, as a layout."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from linear_moe.model.sequence import layout_of

TWO_RANKS = SimpleNamespace(size=lambda: 2, rank=lambda: 1)


def packed(rows, qkv_format="sbhd", **kwargs) -> PackedSeqParams:
    cu_seqlens = torch.tensor(rows, dtype=torch.int32)
    return PackedSeqParams(qkv_format=qkv_format, cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, **kwargs)


def test_without_packing():
    layout = layout_of(None, batch=3, local_length=4, cp_group=TWO_RANKS)
    assert (layout.batch, layout.length, layout.cp_size, layout.cp_rank) == (3, 8, 2, 1)
    assert layout.cu_seqlens is None
    assert layout_of(None, batch=3, local_length=5, cp_group=None).length == 5


def test_packed_per_sequence_is_built_once():
    params = packed([[0, 3, 8, 8], [0, 1, 2, 8]])
    layout = layout_of(params, batch=2, local_length=4, cp_group=TWO_RANKS)
    assert torch.equal(layout.cu_seqlens, params.cu_seqlens_q)
    assert layout_of(params, batch=2, local_length=4, cp_group=TWO_RANKS) is layout
    other = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    assert layout_of(params, batch=2, local_length=4, cp_group=other).cp_rank == 0


def test_one_document_in_every_sequence():
    assert layout_of(packed([[0, 8], [0, 8]]), batch=2, local_length=8, cp_group=None).cu_seqlens.shape == (
        2,
        2,
    )


def test_one_thd_sequence():
    layout = layout_of(packed([0, 3, 6], "thd"), batch=1, local_length=8, cp_group=None)
    assert layout.cu_seqlens.tolist() == [[0, 3, 6, 8]]  # what follows the last boundary is padding
    params = packed([0, 3, 6], "thd", cu_seqlens_q_padded=torch.tensor([0, 4, 8], dtype=torch.int32))
    layout = layout_of(params, batch=1, local_length=8, cp_group=None)
    assert layout.cu_seqlens.tolist() == [[0, 4, 8, 8]]


@pytest.mark.parametrize(
    "params, batch, group",
    [
        (packed([0, 3, 8], "thd"), 1, TWO_RANKS),
        (packed([0, 3, 8], "thd"), 2, None),
        (packed([[0, 8]], "bshd"), 1, None),
        (packed([[0, 8]], local_cp_size=2), 1, None),
        (packed([[0, 8]], cp_group=TWO_RANKS), 1, None),
        (packed([0, 8]), 1, None),
        (packed([[0, 8]]), 2, None),
        (packed([[0, 7]]), 1, None),
        (packed([[1, 8]]), 1, None),
        (packed([[0, 8], [0, 7]]), 2, None),
        (packed([[0, 8], [1, 8]]), 2, None),
        (packed([[0, 5, 4, 8]]), 1, None),
        (PackedSeqParams(qkv_format="sbhd"), 1, None),
        (PackedSeqParams(qkv_format="sbhd", cu_seqlens_q=torch.tensor([[0.0, 8.0]])), 1, None),
    ],
)
def test_what_is_refused_says_what_to_do(params, batch, group):
    with pytest.raises(ValueError, match=r"(?s)\n  why: .*\n  try: "):
        layout_of(params, batch=batch, local_length=8 if group is None else 4, cp_group=group)

"""Which building blocks a model gets."""

import pytest
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from linear_moe.model import backend
from linear_moe.model.attention import CoreAttention
from linear_moe.model.backend import make_backend
from linear_moe.model.column_linear import ColumnLinear
from linear_moe.model.experts import GroupedExperts, SequentialExperts
from linear_moe.model.norm import LayerNorm, RMSNorm


def test_local():
    blocks = make_backend("local")
    assert blocks.column_parallel_linear() is ColumnParallelLinear
    assert blocks.biased_column_linear() is ColumnLinear
    assert blocks.row_parallel_linear() is RowParallelLinear
    assert blocks.core_attention() is CoreAttention
    assert (blocks.layer_norm(rms_norm=True), blocks.layer_norm()) == (RMSNorm, LayerNorm)
    assert not blocks.fuse_layernorm_and_linear() and blocks.column_parallel_layer_norm_linear() is None
    assert blocks.grouped_mlp_modules(False) is blocks.grouped_mlp_modules(True) is GroupedExperts
    sequential = make_backend("local", sequential_experts=True).grouped_mlp_modules(True)
    assert sequential.func is SequentialExperts


@pytest.mark.parametrize("name", ["inference_optimized", "transformer_engine"])
def test_what_is_not_there_is_refused(monkeypatch, name):
    monkeypatch.setattr(backend, "HAVE_TE", False)
    with pytest.raises(ValueError, match=r"(?s)\n  why: .*\n  try: --transformer-impl local"):
        make_backend(name)

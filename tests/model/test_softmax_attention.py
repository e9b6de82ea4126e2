"""Rotary positions of softmax attention, turned at once where there is a kernel: as Megatron turns them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from linear_moe.model import softmax_attention
from linear_moe.model.backend import make_backend
from linear_moe.model.softmax_attention import SoftmaxAttention
from linear_moe.model.specs import softmax_spec
from tests.workers import with_model_parallel

T, B, D, K = 12, 2, 24, 8
DOCUMENTS = torch.tensor([[0, 5, 6, T], [0, 0, 8, T]], dtype=torch.int32)

CASES: dict[str, dict[str, Any]] = {
    "as many keys as queries": {},
    "keys shared by queries": dict(num_query_groups=2),
    "a part of each head, gate and norms": dict(
        num_query_groups=1, angles=2, attention_output_gate=True, qk_layernorm=True, normalization="RMSNorm"
    ),
    "a temperature": dict(scale=1.3),
    "packed documents": dict(packed="sbhd"),
}


def layer(**options: Any) -> SoftmaxAttention:
    config = TransformerConfig(
        num_layers=1, hidden_size=D, num_attention_heads=4, kv_channels=K, add_bias_linear=False,
        attention_dropout=0.0, params_dtype=torch.float64, use_cpu_initialization=True, **options,
    )  # fmt: skip
    groups = ProcessGroupCollection.use_mpu_process_groups()
    spec = softmax_spec(config, make_backend("local"))
    module: SoftmaxAttention = build_module(spec, config=config, layer_number=1, pg_collection=groups)
    return module


def freqs(angles: int) -> Tensor:
    """As Megatron has them, ``[T, 1, 1, R]``, but in float64."""
    half = torch.outer(torch.arange(T).double(), 10.0 ** -torch.arange(angles).double())
    return torch.cat([half, half], -1)[:, None, None]


def packed(kind: str | None) -> PackedSeqParams | None:
    if kind is None:
        return None
    documents = DOCUMENTS if kind == "sbhd" else DOCUMENTS[0]
    return PackedSeqParams(
        qkv_format=kind, cu_seqlens_q=documents, cu_seqlens_kv=documents, max_seqlen_q=T, max_seqlen_kv=T
    )


def results(module: SoftmaxAttention, table: Tensor, params: PackedSeqParams | None) -> list[Tensor]:
    """The output, and the gradients of its input and of all parameters."""
    batch = 1 if params is not None and params.qkv_format == "thd" else B
    x = torch.randn(T, batch, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = [x.requires_grad_(), *module.parameters()]
    out, _ = module(x, None, rotary_pos_emb=table, packed_seq_params=params)
    return [out.detach(), *torch.autograd.grad((out * out.detach().cos()).sum(), leaves)]


def with_kernel() -> Any:
    """As on a GPU: what runs in the kernel's place is its definition in torch."""
    return mock.patch.object(softmax_attention, "_has_fused_rotary", lambda x: True)


def both_ways(rank: int, world_size: int, options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], int]:
    """By Megatron and as on a GPU, and how often anything was turned there."""
    scale, angles = options.pop("scale", 1.0), options.pop("angles", K // 2)
    params = packed(options.pop("packed", None))
    turn = mock.Mock(wraps=softmax_attention.rotate_heads)
    with with_model_parallel(), mock.patch.object(softmax_attention, "rotate_heads", turn):
        module = layer(**options)
        module._yarn_concentration_factor = scale
        stock = results(module, freqs(angles), params)
        assert not turn.call_count, "no kernel on a CPU"
        with with_kernel():
            return stock, results(module, freqs(angles), params), turn.call_count


@pytest.mark.parametrize("name", CASES)
def test_one_call_turns_queries_and_keys_as_megatron(gloo: Any, name: str) -> None:
    [(stock, found, count)] = gloo(1, both_ways, CASES[name])
    assert count == 1
    for x, y in zip(found, stock, strict=True):
        torch.testing.assert_close(x, y, atol=1e-13, rtol=1e-11)


@pytest.mark.parametrize(
    "options", [dict(packed="thd"), dict(rotary_interleaved=True)], ids=["documents end to end", "neighbours"]
)
def test_what_stays_megatrons(gloo: Any, options: dict[str, Any]) -> None:
    [(stock, found, count)] = gloo(1, both_ways, options)
    assert count == 0 and all(map(torch.equal, found, stock))


def fused_by_others(rank: int, world_size: int) -> bool:
    with with_model_parallel(), with_kernel():
        module = layer()
        module.config.apply_rope_fusion = True
        return module._turns_both(torch.zeros(1))


def test_transformer_engines_kernel_comes_first(gloo: Any) -> None:
    assert gloo(1, fused_by_others) == [False]


def decoding(rank: int, world_size: int) -> tuple[Any, Any]:
    """A token of each row, at its own place."""
    draw = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1, B, heads, K, dtype=torch.float64, generator=draw) for heads in (4, 2))
    with with_model_parallel():
        module = layer(num_query_groups=2)
        table = freqs(K // 2)[:, 0][torch.tensor([[3, 11]])]
        stock = module._rotate(q, k, table)
        with with_kernel():
            return stock, module._rotate(q, k, table)


def test_a_step_of_decoding(gloo: Any) -> None:
    [(stock, found)] = gloo(1, decoding)
    assert all(map(torch.equal, found, stock))

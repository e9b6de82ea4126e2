"""The CUDA paths of attention and experts against float64 on the CPU; run where there is a device."""

import math
from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from linear_moe.kernels import grouped_linear
from linear_moe.model.attention import CoreAttention, _allowed
from linear_moe.model.experts import _warn_of_loop_once
from linear_moe.model.norm import RMSNorm
from linear_moe.model.output_loss import _add_product
from linear_moe.parallel.layout import SequenceLayout

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
B, S, H = 2, 256, 8
DOCUMENTS = [[0, 50, 51, 192, 256, 256], [0, 128, 128, 150, 151, 256]]


def core_attention(cp_size: int, rank: int, whole: list[torch.Tensor]) -> CoreAttention:
    """Rank ``rank`` of ``cp_size``, with the gathered keys and values handed to it."""
    group = SimpleNamespace(size=lambda: cp_size, rank=lambda: rank)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=H, attention_dropout=0.0)
    core = CoreAttention(config, 1, AttnMaskType.causal, pg_collection=SimpleNamespace(tp=group, cp=group))
    core._gather = lambda k, v, layout: (whole[1], whole[2])
    return core


def in_float64(q, k, v, documents) -> torch.Tensor:
    cu_seqlens = None if documents is None else torch.tensor(documents)
    allowed = _allowed(len(q), len(k), SequenceLayout(B, len(k), cu_seqlens=cu_seqlens), None, q.device)
    k, v = (x.repeat_interleave(H // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("tbhk,sbhk->bhts", q, k) / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return torch.einsum("bhts,sbhv->tbhv", weights, v).flatten(2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["plain", "packed"])
@pytest.mark.parametrize("cp_size", [1, 2])
@pytest.mark.parametrize(
    "groups, key_dim, value_dim", [(H, 64, 64), (2, 128, 128), (H, 192, 128), (2, 20, 12)]
)
def test_attention(groups, key_dim, value_dim, cp_size, documents, dtype):
    torch.manual_seed(0)
    shapes = [(S, B, H, key_dim), (S, B, groups, key_dim), (S, B, groups, value_dim)]
    true_leaves = [torch.randn(shape).to(dtype).double().requires_grad_() for shape in shapes]
    weight = torch.randn(S, B, H * value_dim, dtype=torch.float64)
    expected = in_float64(*true_leaves, documents)
    true = [expected, *torch.autograd.grad((expected * weight).sum(), true_leaves)]
    leaves = [x.detach().to(DEVICE, dtype).requires_grad_() for x in true_leaves]
    params = None
    if documents is not None:
        cu_seqlens = torch.tensor(documents, dtype=torch.int32, device=DEVICE)
        params = PackedSeqParams(qkv_format="sbhd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)
    outputs, total = [], 0
    for rank in range(cp_size):
        layout = SequenceLayout(B, S, cp_size, rank)
        q, k, v = (layout.take(x, dim=0) for x in leaves)
        out = core_attention(cp_size, rank, leaves)(q, k, v, None, packed_seq_params=params)
        assert out.dtype == dtype and out.is_contiguous()
        outputs.append((layout, out))
        total = total + (out * layout.take(weight, dim=0).to(DEVICE)).sum()
    for layout, out in outputs:
        close(out, layout.take(true[0], dim=0), dtype)
    for got, whole in zip(torch.autograd.grad(total, leaves), true[1:], strict=True):
        close(got, whole, dtype)


@pytest.mark.parametrize("queries", [1, 7])
def test_decoding(queries):
    torch.manual_seed(0)
    true = [torch.randn(n, B, h, 64).bfloat16().double() for n, h in ((queries, H), (S, 2), (S, 2))]
    q, k, v = (x.to(DEVICE, torch.bfloat16) for x in true)
    found = core_attention(1, 0, [])(q, k, v, None, attn_mask_type=AttnMaskType.no_mask)
    close(found, in_float64(*true, None), torch.bfloat16)


@pytest.mark.parametrize(
    "counts", [[300, 0, 1, 77, 0, 134], [0, 0, 512, 0, 0, 0], [0] * 6, [0, 1, 0, 0, 0, 0]]
)
def test_grouped_linear(counts):
    torch.manual_seed(0)
    x = torch.randn(sum(counts), 64).bfloat16()
    weight = (torch.randn(6, 96, 64) / 8).bfloat16()
    direction = torch.randn(1, 96).bfloat16()
    leaves = [t.double().requires_grad_() for t in (x, weight)]
    expected = grouped_linear.looped_linear(*leaves, counts)
    true = torch.autograd.grad(expected, leaves, direction.double().expand_as(expected), allow_unused=True)
    device_leaves = [t.to(DEVICE).requires_grad_() for t in (x, weight)]
    assert grouped_linear.can_group(*device_leaves)
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32).to(DEVICE)
    for _ in range(3):  # memory that earlier kernels have written to
        found = grouped_linear.grouped_linear(*device_leaves, ends)
        close(found, expected, torch.bfloat16)
        grads = torch.autograd.grad(found, device_leaves, direction.to(DEVICE).expand_as(found))
        for got, whole in zip(grads, true, strict=True):
            close(got, torch.zeros(got.shape) if whole is None else whole, torch.bfloat16)
        assert not grads[1][torch.tensor(counts) == 0].any()


def test_grouped_linear_does_not_wait_for_the_device():
    x = torch.randn(64, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, 96, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    ends = torch.tensor([16, 32, 48, 64], dtype=torch.int32, device=DEVICE)
    grouped_linear.grouped_linear(x, weight, ends).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        grouped_linear.grouped_linear(x, weight, ends).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_norm():
    config = TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=1, params_dtype=torch.bfloat16
    )
    x = (torch.randn(100, 64) * 300).bfloat16()
    true = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    close(RMSNorm(config, 64, 1e-5)(x.to(DEVICE)), true, torch.bfloat16)


def test_a_product_is_added_to_float32():
    torch.manual_seed(0)
    logits, x = (torch.randn(200, n, device=DEVICE).bfloat16() for n in (96, 64))
    total = torch.randn(96, 64, device=DEVICE)
    true = total.double() + logits.double().t() @ x.double()
    _add_product(torch.zeros_like(total), logits.t(), x, is_first=False)  # cuBLAS takes its workspace
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    _add_product(total, logits.t(), x, is_first=False)
    assert torch.cuda.max_memory_allocated() == before, "a product of its own"
    assert ((total - true).norm() / true.norm()).item() < 1e-6


def test_the_loop_is_announced_once():
    with pytest.warns(UserWarning, match="device sync"):
        _warn_of_loop_once(torch.float32, (1, 2, 3))


def close(found: torch.Tensor, true: torch.Tensor, dtype: torch.dtype) -> None:
    """Within the rounding of ``dtype``, relative to the size of the whole tensor."""
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 2e-3}[dtype]
    if true.numel():
        error = (found.detach().double().cpu() - true.detach()).norm() / true.norm().clamp(min=1e-6)
        assert error < tolerance, error.item()
